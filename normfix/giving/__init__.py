"""Giving back: the fixed model in the format it came from, which its own tool runs without normfix."""
