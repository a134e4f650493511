"""Run a command of `gpt` as a child process: its options, signals, torchrun's environment, and one stage as a whole."""
