"""Splits of a corpus of lines, whatever a line holds: shuffled with a fixed seed, then cut."""

import random
from typing import TypeVar

from lm.errors import UserError

SPLIT_SEED = 42  # makemore's: the split is part of the reference figures, not of the run
Item = TypeVar("Item")


def shuffled(corpus: str, items: list[Item], val_fraction: float, test_fraction: float) -> dict[str, list[Item]]:
    """Return the items of each split: train, val and test.

    Raises:
        UserError: There are too few for one of them.
    """
    items = list(items)
    random.Random(SPLIT_SEED).shuffle(items)
    first = int((1 - val_fraction - test_fraction) * len(items))
    second = int((1 - test_fraction) * len(items))
    splits = {"train": items[:first], "val": items[first:second], "test": items[second:]}
    for name, part in splits.items():
        if not part and (name != "test" or test_fraction):
            raise UserError(f"corpus {corpus}: {len(items)} lines leave none for its {name} split: use more")
    return splits
