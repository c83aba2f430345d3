"""Metrics and the report: how good a model is, told from held-out episodes."""
