"""The Python API: load a checkpoint, generate and score text."""
