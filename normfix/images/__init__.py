"""Pixels in and out, whole or by window."""
