"""A GPT that another program saved, made a checkpoint of lm's: to sample from, to evaluate, for fine-tuning."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm import storage
from lm.checkpoints.schema import NET, Saved
from lm.errors import described
from lm.tokenizers import BytePairTokenizer, Tokenizer, to_state


@dataclass(frozen=True)
class Foreign:
    """What another program's file or folder holds, as lm has it."""

    settings: dict[str, Any]
    """GPT's."""
    weights: dict[str, Tensor]
    """GPT's."""
    vocab_size: int
    """Rows of the embedding."""
    block_size: int
    tokenizer: Tokenizer | None
    """None where it has none."""
    step: int = 0
    """Optimizer steps done, where that is known."""

    def saved(self, name: str) -> Saved:
        """Return the checkpoint.

        Args:
            name: Of the run that would have made it.

        Raises:
            ValueError: There is no tokenizer, or it is of another size than the embedding.
        """
        if self.tokenizer is None:
            raise ValueError("it has no tokenizer")
        tokenizer = padded(self.tokenizer, self.vocab_size)
        if tokenizer.n_vocab != self.vocab_size:
            raise ValueError(
                f"its tokenizer has {tokenizer.n_vocab:,} ids, and the embedding {self.vocab_size:,} rows: there "
                "have to be as many"
            )
        sizes = {"block_size": self.block_size, "batch_size": 8}
        double = any(value.element_size() == 8 for value in self.weights.values())
        recipe = {
            "name": name,
            "seed_everything": 1337,
            "trainer": {"precision": "64-true" if double else "32-true"},
            "model": {
                "class_path": "lm.training.LanguageModel",
                "init_args": {"net": {"class_path": "lm.models.GPT", "init_args": self.settings}},
            },
            "data": {"class_path": "lm.data.TextData", "init_args": {"corpus": "python-docs", **sizes}},
        }
        return Saved(
            step=self.step,
            state={NET + key: value for key, value in self.weights.items()},
            config=recipe,
            tokenizer=to_state(tokenizer),
            vocab_size=self.vocab_size,
            block_size=self.block_size,
        )

    def with_tokenizer(self, tokenizer: Tokenizer) -> "Foreign":
        """Return the same with a tokenizer."""
        return replace(self, tokenizer=tokenizer)


def padded(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """Return a byte-pair tokenizer with an unused last id where an embedding was filled up to a round number of rows.

    GPUs multiply matrices faster whose sizes are multiples of 64 or 128: nanoGPT has 50,304 rows for 50,257 ids.

    Args:
        tokenizer: Any; others are returned as they are.
        rows: Of the embedding.
    """
    rounded = any(rows % size == 0 and 0 < rows - tokenizer.n_vocab < size for size in (64, 128))
    if not rounded or not isinstance(tokenizer, BytePairTokenizer):
        return tokenizer
    special = tokenizer.special_ids | {f"<|unused {rows - 1}|>": rows - 1}
    filled = BytePairTokenizer(tokenizer.ranks, tokenizer.pattern, special, tokenizer.end_of_text)
    filled.chat = tokenizer.chat
    return filled


def load_weights_only(path: Path) -> Any:
    """Return what a file of torch.save holds; code in it is never run.

    Raises:
        ValueError: It is damaged, holds code, or is another program's.
        OSError: It is a pipe, or cannot be opened.
    """
    with storage.plain(path).open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can raise anything
            raise ValueError(
                f"{path.name} is damaged, has code in it, or is no file of torch.save ({described(error, 80)})"
            ) from error
