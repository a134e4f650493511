"""The GPT, its parts, and the checkpoint format."""
