"""Conformance: real architectures scanned, converted and proved by arithmetic that normfix has no part in."""
