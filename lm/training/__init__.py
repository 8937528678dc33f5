"""How a network is fitted: LightningModules, schedules, callbacks, checkpoint and log files."""

from lm.training.language_model import LanguageModel
from lm.training.manual import ManualLanguageModel

__all__ = ["LanguageModel", "ManualLanguageModel"]
