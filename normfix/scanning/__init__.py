"""Find what is computed from the tile, and the geometry of the network without it."""
