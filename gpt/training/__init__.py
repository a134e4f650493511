"""Training: the loop, optimizers, data parallelism and resume states."""
