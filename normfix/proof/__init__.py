"""Tiles equal the whole; every claim is a step that can fail."""
