"""The server: OpenAI's protocol over `lm.generation.engine`, and a page; no Lightning."""
