"""How far an output reaches, tiles, stitching, and stages over blocks."""
