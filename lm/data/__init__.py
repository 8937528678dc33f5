"""Where tokens come from: tokenizers, corpora, chunks, LightningDataModules."""

from lm.data.text import TextData

__all__ = ["TextData"]
