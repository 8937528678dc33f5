"""How evaluation sets are divided over ranks, all of them; and two real ranks whose batches do not divide."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lm.data import ArithmeticData, LinesData, ReverseData, TextData, evaluation_sets
from lm.data.chunks import IGNORED
from lm.data.module import TokenData
from lm.data.shard_writer import Writer, save_tokenizer
from lm.data.tokenizers import ByteTokenizer
from tests.conftest import RECIPE, start

SPLIT = "val"


def of_text(workplace: Path, count: int) -> TextData:
    """Running text of so many sequences, the last of them short."""
    (workplace / "text.txt").write_text("abcdefgh" * 100 + "a" * (4 * count))
    data = TextData(corpus="text.txt", block_size=4, val_fraction=4 * count / (800 + 4 * count))
    data.prepare_data()
    return data


def prepared(folder: Path, count: int) -> None:
    folder.mkdir()
    save_tokenizer(folder, ByteTokenizer())
    writer = Writer(folder, ByteTokenizer(), 10_000)
    for split, documents in {"train": 9, "val": count}.items():
        ids = np.concatenate([np.array([i, 100 + i, 256]) for i in range(documents)] or [[]])
        writer.append(split, ids.astype("<u2").tobytes(), 3 * np.arange(documents))
    writer.commit({})
    writer.finish({"documents": 9 + count, "bytes": 1, "replaced": 0})


def of_documents(workplace: Path, count: int) -> TextData:
    """A chunk a document."""
    prepared(workplace / "corpus", count)
    data = TextData(corpus="corpus", block_size=4, across_documents=False)
    data.prepare_data()
    return data


def of_a_mixture(workplace: Path, count: int) -> TextData:
    """Documents of two corpora."""
    prepared(workplace / "corpus", count // 2)
    prepared(workplace / "more", count - count // 2)
    data = TextData(corpus={"corpus": 2, "more": 1}, block_size=4, across_documents=False)
    data.prepare_data()
    return data


def of_lines(workplace: Path, count: int) -> LinesData:
    """A line an example."""
    data = LinesData(corpus="text.txt", block_size=8, targets="all")
    data.examples = {SPLIT: (torch.arange(8 * count).view(-1, 8), torch.arange(8 * count).view(-1, 8))}
    return data


def of_symbols(workplace: Path, count: int) -> LinesData:
    """A symbol an example."""
    data = LinesData(corpus="text.txt", block_size=8)
    data.examples = {SPLIT: (torch.arange(8 * count).view(-1, 8), torch.arange(count))}
    return data


def of_sums(workplace: Path, count: int) -> ArithmeticData:
    """A problem an example."""
    data = ArithmeticData(held_out=max(1, count))
    data.setup("fit")
    data.held_out = count
    return data


def of_strings(workplace: Path, count: int) -> ReverseData:
    """A string an example."""
    data = ReverseData(held_out=max(1, count))
    data.setup("fit")
    data.held_out = count
    return data


def divided(data: TokenData, rank: int, world_size: int) -> Any:
    data._place = lambda: {"rank": rank, "world_size": world_size}  # type: ignore[method-assign]
    return data.eval_dataset(SPLIT)


SETS = [of_text, of_documents, of_a_mixture, of_lines, of_symbols, of_sums, of_strings]


@pytest.mark.parametrize("make", SETS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("count", range(10))
def test_each_example_once_and_as_many_batches_on_each_rank(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, make: Callable, count: int
) -> None:
    if count == 0 and make in (of_documents, of_a_mixture, of_text):
        pytest.skip("no sequences in a text are refused when it is set up")
    for constant in ("lm.data.text.EVAL_TOKENS", "lm.data.lines.EVAL_TOKENS", "lm.data.tasks.EVAL_ROWS"):
        monkeypatch.setattr(constant, 1)  # a sequence a batch: as many batches as sequences
    data = make(workplace, count)
    alone = divided(data, 0, 1)
    whole = [alone[k] for k in range(len(alone))]
    expected = sorted(row for batch in whole for row in rows(*batch))
    assert len(whole) == count
    for world_size in (1, 2, 3, 4):
        shares = [divided(data, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {-(-count // world_size)}
        batches = [share[k] for share in shares for k in range(len(share))]
        assert sorted(row for batch in batches for row in rows(*batch)) == expected
        sums = [sum(int(y[y != IGNORED].sum()) for _, y in some) for some in (whole, batches)]
        assert sums[0] == sums[1]


def rows(tokens: torch.Tensor, targets: torch.Tensor) -> list[tuple[list, list]]:
    """Return the examples of a batch in which something is predicted."""
    targets = targets.reshape(len(tokens), -1)
    return [(x, y) for x, y in zip(tokens.tolist(), targets.tolist(), strict=True) if set(y) != {IGNORED}]


@pytest.mark.parametrize("length", [9, 17, 18, 41, 100, 129, 999])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_a_text_has_every_target_once(length: int, world_size: int) -> None:
    ids, targets = np.arange(length, dtype=np.uint16), []
    for rank in range(world_size):
        chunks = evaluation_sets.of_chunks(ids, block_size=8, batch_size=4, rank=rank, world_size=world_size)
        for x, y in (chunks[k] for k in range(len(chunks))):
            if (y != IGNORED).any():
                assert torch.equal(x + 1, y) and x.shape[0] <= 4 and x.shape[1] <= 8
                targets += y.flatten().tolist()
    assert sorted(targets) == list(range(1, length))


def test_two_ranks_end_their_evaluation_together(lm, workplace: Path) -> None:
    """15 batches over two ranks once hung: one waited for the sums, the other for the signals."""
    prepared(workplace / "corpus", 15)
    trainer = {**RECIPE["trainer"], "max_steps": 4, "val_check_interval": 2, "devices": 2}
    (workplace / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "trainer": trainer}))
    words = ["--data.init_args.corpus", "corpus", "--data.init_args.across_documents", "false"]
    fit = start("fit", "--config", "tiny.yaml", *words, "--json", cwd=workplace)
    try:
        out, error = fit.communicate(timeout=100)
    finally:
        fit.terminate()
    assert fit.returncode == 0, error
    loss = json.loads(out.splitlines()[-1])["val_loss"]
    alone = json.loads(lm("validate", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--json")[1].splitlines()[-1])
    assert alone["loss"] == pytest.approx(loss, rel=1e-5) and alone["tokens"] == 2 * 15
