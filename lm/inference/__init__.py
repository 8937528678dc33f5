"""What a fitted network is for: sampling and evaluation."""

from lm.inference.loading import load
from lm.inference.sampling import Sampler, generate

__all__ = ["Sampler", "generate", "load"]
