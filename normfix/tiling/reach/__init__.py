"""Reach from the graph: which pixels an aligned tile depends on, by exact rules over operators and no values."""
