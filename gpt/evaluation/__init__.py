"""Metrics and plots of a trained model."""
