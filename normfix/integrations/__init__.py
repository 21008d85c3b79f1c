"""Adapters for frameworks that train and predict; each module imports its framework."""
