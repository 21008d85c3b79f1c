"""How far an output reaches, tiles, stitching, stages over blocks."""
