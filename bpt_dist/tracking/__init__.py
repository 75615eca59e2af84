"""The run directory mirrored to MLflow."""
