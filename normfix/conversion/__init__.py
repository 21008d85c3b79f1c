"""From a plan to a network with constants: decide, rewrite, measure."""
