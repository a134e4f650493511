"""Measure a model and look into it."""
