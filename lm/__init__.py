"""Language models from a bigram table to GPT-2, fitted by one Lightning Trainer."""

__version__ = "0.1.0"
