"""The scan of a captured graph."""
