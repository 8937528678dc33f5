"""What a network computes: plain torch.nn modules, `forward(tokens) -> logits`, no loss, data or precision."""

from lm.models.bigram import Bigram
from lm.models.gpt import GPT

__all__ = ["GPT", "Bigram"]
