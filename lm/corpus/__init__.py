"""Text to shards of tokens, without torch: sources, file formats, shards, preparation in parallel."""
