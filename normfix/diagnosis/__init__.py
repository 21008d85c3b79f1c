"""Measure the seams of a pipeline and name their causes."""
