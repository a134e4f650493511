"""The files of a run folder, and their publication to MLflow."""
