"""Wrappers that DVC runs around the commands of gpt: they start the command and publish its results to MLflow."""
