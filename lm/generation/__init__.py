"""Using a trained network: sampling and evaluation."""

from lm.checkpoints.restore import load_network
from lm.generation.sampling import Sampler, generate

__all__ = ["Sampler", "generate", "load_network"]
