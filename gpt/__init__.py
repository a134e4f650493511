"""chargpt: a small GPT, the text it learns from and the commands that bring the two together."""
