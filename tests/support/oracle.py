"""A network that knows a task: what asks it is tested without training."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm.checkpoints import checkpoint
from lm.checkpoints.schema import NET, Saved
from lm.data.tasks import END, TaskData, task_of
from lm.tokenizers import to_state


class Oracle(nn.Module):
    """Writes what the task's own examples have; a wrong digit in each answer of `wrong`, and no end in `endless`."""

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        data: dict[str, Any],
        wrong: Sequence[str] = (),
        endless: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.wrong, self.endless = wrong, endless
        self.task = known(data)
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, V) of the next token: 1 of that which follows, 0 of others."""
        tokenizer = self.task.text_tokenizer
        following = [self.next_of(tokenizer.decode(row)) for row in tokens.tolist()]
        ids = torch.from_numpy(tokenizer.encode("".join(following)))
        return nn.functional.one_hot(ids, self.vocab_size).float()

    @cached_property
    def texts(self) -> dict[str, str]:
        """All problems and their answers."""
        return dict(map(self.task.example, range(self.task.size)))

    def next_of(self, text: str) -> str:
        """Return the character after a text."""
        sign = "=" if "=" in text else ">"
        problem, _, written = text.removeprefix(END).partition(sign)
        problem += sign
        answer = self.texts[problem]
        if problem in self.wrong:
            answer = answer[:-1] + ("1" if answer[-1] != "1" else "2")
        return (answer + ("0" * 99 if problem in self.endless else END))[len(written) :][:1] or END


def known(data: dict[str, Any]) -> TaskData:
    """Return a task, ready."""
    task = task_of(data)
    assert task is not None
    task.setup("fit")
    return task


def written(path: Path, kind: str, settings: dict[str, Any], **oracle: Any) -> TaskData:
    """Write the checkpoint of a network that knows a task of lm.data; return the task."""
    data = {"class_path": f"lm.data.{kind}", "init_args": settings}
    task = known(data)
    tokenizer = task.text_tokenizer
    net = {"class_path": "tests.support.oracle.Oracle", "init_args": {"data": data, **oracle}}
    model = {"class_path": "lm.training.LanguageModel", "init_args": {"net": net}}
    saved = Saved(
        step=7,
        state={f"{NET}nothing": torch.zeros(1)},
        config={"name": path.stem, "trainer": {"precision": "32-true"}, "model": model, "data": data},
        tokenizer=to_state(tokenizer),
        vocab_size=tokenizer.n_vocab,
        block_size=task.block_size,
    )
    checkpoint.write(saved.imported(), path)
    return task
