"""Measure the seams of a pipeline and name their causes; the order of the steps is the pipeline's."""
