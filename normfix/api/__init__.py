"""The verbs that need all of it."""
