"""Networks as FX graphs: captured, replayed, read."""
