"""Text generation: sampling, decoding with a key-value cache, and text output."""
