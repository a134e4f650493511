"""The HTTP server: OpenAI's completions with continuous batching, and a page to explore a model."""
