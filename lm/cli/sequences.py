"""A sequence of a batch as people read it: its ids, its text, and which of its tokens the network learns to write."""

import os
from itertools import groupby
from typing import IO, Any

from torch import Tensor

from lm.data.module import IGNORED
from lm.tokenizers import Tokenizer

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def described(tokens: Tensor, targets: Tensor, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return a sequence's ids, what each stands for, and whether it is predicted; None where all are.

    Args:
        tokens: int64 (T,).
        targets: int64 (T,): the token after each position, or IGNORED.
        tokenizer: Theirs.
    """
    predicted = [False, *(targets != IGNORED).tolist()]  # token t + 1 is the target of position t
    if all(predicted[1:]):
        return None
    ids = [*tokens.tolist(), int(targets[-1]) if predicted[-1] else tokenizer.eot]
    while not predicted[-1] and (ids[-1] is None or ids[-1] == tokenizer.eot):  # padding
        ids.pop()
        predicted.pop()
    names = {i: name for name, i in tokenizer.special_ids.items()}
    pieces = [names.get(i) or tokenizer.decode([i]) for i in ids]
    return {"ids": ids, "pieces": pieces, "predicted": predicted}


def lines(sequence: dict[str, Any], stream: IO[str]) -> list[str]:
    """Return the lines that show it: what is predicted in green on a terminal, in brackets elsewhere."""
    colour = stream.isatty() and not os.environ.get("NO_COLOR")
    begin, end = (GREEN, PLAIN) if colour else ("[", "]")

    def marked(parts: list[str], between: str) -> str:
        runs = groupby(zip(parts, sequence["predicted"], strict=True), key=lambda pair: pair[1])
        texts = [(yes, between.join(part for part, _ in run)) for yes, run in runs]
        return between.join(f"{begin}{text}{end}" if yes else text for yes, text in texts)

    return [
        f"a sequence; {'green' if colour else 'in brackets'} is what the network learns to write:",
        marked([piece.replace("\n", "↵") for piece in sequence["pieces"]], ""),
        marked([str(i) for i in sequence["ids"]], " "),
    ]
