"""Token files, the windows that a model reads, and the loss on them."""
