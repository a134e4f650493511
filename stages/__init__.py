"""What DVC runs around the commands of gpt: start the command, follow its files, publish to MLflow."""
