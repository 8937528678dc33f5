"""Checkpoint files, lm's own and for other programs, without Lightning."""
