"""Export of checkpoints to formats of other programs."""
