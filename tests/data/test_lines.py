import random
from pathlib import Path

import pytest
import torch

from lm.data import LinesData
from lm.data.module import IGNORED
from lm.errors import UserError

LINES = ["emma", "olivia", "ava", "isabella", "sophia", "mia", "amelia", "eva", "zoe", "lia"]


@pytest.fixture
def names(workplace: Path) -> str:
    (workplace / "few.txt").write_text("\n".join(LINES) + "\n")
    return "few.txt"


def made(**settings) -> LinesData:
    data = LinesData(**settings)
    data.setup("fit")
    return data


@pytest.mark.parametrize("block_size", [3, 8])
def test_split_and_counts_are_the_references(reference: Path, block_size: int) -> None:
    data = made(block_size=block_size)
    assert {name: len(y) for name, (_, y) in data.examples.items()} == {"train": 182_625, "val": 22_655, "test": 22_866}
    assert data.vocab_size == 27
    assert data.text_tokenizer.decode(range(27)) == ".abcdefghijklmnopqrstuvwxyz"
    lines = (reference / "names.txt").read_text().split()
    random.Random(42).shuffle(lines)
    tokens, targets = data.examples["train"]
    row = 0
    for line in lines[:50]:
        text = "." * block_size + line + "."
        for i in range(len(line) + 1):
            assert data.text_tokenizer.decode(tokens[row].tolist()) == text[i : i + block_size]
            assert data.text_tokenizer.decode([int(targets[row])]) == text[i + block_size]
            row += 1


def test_whole_lines_have_the_same_targets(reference: Path) -> None:
    whole, windows = made(targets="all", block_size=16), made(block_size=4)
    for name, (tokens, targets) in whole.examples.items():
        assert torch.equal(targets[targets != IGNORED], windows.examples[name][1])
        assert (tokens[:, 0] == 0).all()
        shown = targets[:, :-1] != IGNORED
        following = tokens[:, 1:][shown & (targets[:, :-1] != 0)]
        assert torch.equal(following, targets[:, :-1][shown & (targets[:, :-1] != 0)])


def test_a_stack_of_steps_is_the_steps(names: str) -> None:
    data = made(corpus=names, block_size=3, batch_size=4)
    single, stacked = data.train_dataset(1), data.train_dataset(5)
    tokens, targets = stacked[2]
    assert tokens.shape == (5, 4, 3) and targets.shape == (5, 4)
    for i in range(5):
        assert torch.equal(tokens[i], single[10 + i][0]) and torch.equal(targets[i], single[10 + i][1])


def test_evaluation_is_every_example_once(names: str) -> None:
    data = made(corpus=names, block_size=3, val_fraction=0.3)
    found = torch.cat([targets for _, targets in data.val_dataloader()])
    assert torch.equal(found, data.examples["val"][1])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "corpus few.txt: it has no lines"),
        ("\n\n", {}, "corpus few.txt: it has no lines"),
        ("emma\n" * 50, {}, r"its 50 lines are 1 different one\(s\)"),
        ("a.b\nc\nd\n" * 9, {}, r"a line contains the end mark '\.': set data.end"),
        ("ab\nc\nd\n", {}, "leave none for its"),
        ("abcdef\nb\nc\n" * 9, {"targets": "all", "block_size": 6}, "'abcdef' and its mark need 7 tokens"),
        ("ab\nc\nd\n" * 9, {"end": ""}, "data.end is ''"),
        ("ab\nc\nd\n" * 9, {"val_fraction": 0.9}, "data.val_fraction 0.9 and data.test_fraction 0.1 leave"),
    ],
)
def test_bad_lines(workplace: Path, text: str, settings: dict, message: str) -> None:
    (workplace / "few.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        made(corpus="few.txt", **settings)


def test_an_end_mark_out_of_order_still_has_id_0(workplace: Path) -> None:
    (workplace / "few.txt").write_text("\n".join(LINES))
    tokenizer = made(corpus="few.txt", end="|").text_tokenizer
    assert tokenizer.encode("|ab|").tolist() == [0, 1, 2, 0]
    assert tokenizer.decode([0, 1, 2, 0]) == "|ab|"
    from lm.tokenizers import from_state, identity

    assert identity(from_state(tokenizer.state()).state()) == identity(tokenizer.state())
    assert from_state(tokenizer.state()).eot == 0
    with pytest.raises(UserError, match="lacks 'ß'"):
        tokenizer.encode("aß")
