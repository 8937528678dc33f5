"""Where tokens come from: tokenizers, corpora, chunks, LightningDataModules."""

from lm.data.lines import LinesData
from lm.data.tasks import ArithmeticData, ReverseData
from lm.data.text import TextData

__all__ = ["ArithmeticData", "LinesData", "ReverseData", "TextData"]
