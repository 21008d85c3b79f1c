"""Tiles equal the whole image: every claim is a step that can fail."""
