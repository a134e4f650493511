"""The GPT, the baselines, and the checkpoint format."""
