"""The training loop and all that makes it exact, distributed and resumable."""
