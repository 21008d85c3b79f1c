"""Decide, rewrite, measure: from a plan to a network with constants."""
