"""Shards are read through when they are first opened, once a machine: what is damaged is never trained on."""

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lm.corpus import remote, shards, token_cache, verification
from lm.corpus.prepare import Preparation, prepare
from lm.corpus.shard_header import HEADER
from lm.corpus.shard_writer import ShardWriter, save_tokenizer
from lm.data import TextData
from lm.errors import UserError
from lm.tokenizers import ByteTokenizer
from tests.support.cases import often

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def corpus(workplace: Path) -> Path:
    prepare(Preparation(["text.txt"], "byte", Path("corpus"), shard_tokens=6000, workers=1))
    return workplace / "corpus"


def flip(path: Path, at: int = 40) -> None:
    """Change a token for another of the vocabulary."""
    data = bytearray(path.read_bytes())
    data[HEADER + at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("workers", "split"), often([(0, "train"), (1, "val"), (1, "train"), (0, "val")], 2))
def test_a_flipped_token_ends_a_fit_in_one_line(corpus: Path, lm: Run, split: str, workers: int) -> None:
    words = ("fit", "--config", "tiny.yaml", "--data.init_args.corpus", corpus, "--data.init_args.num_workers", workers)
    assert lm(*words, "--name", "whole")[0] == 0
    flip(corpus / f"{split}-00000.tokens")
    code, _, error = lm(*words, "--name", "damaged")
    assert code == 2 and len(error.splitlines()[-1:]) == 1 and "Traceback" not in error
    assert f"{split}-00000.tokens: its checksum is wrong: copy or prepare it again" in error.splitlines()[-1]


@pytest.mark.slow
def test_so_it_does_where_a_worker_reads_it(corpus: Path, lm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "HELD", 0)
    flip(corpus / "train-00001.tokens")
    words = ("--data.init_args.corpus", corpus, "--data.init_args.num_workers", 1)
    code, _, error = lm("fit", "--config", "tiny.yaml", *words)
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith("error: shard ") and "train-00001.tokens: its checksum is wrong" in last
    assert "Traceback" not in error and len(last) < 300


@pytest.mark.slow
def test_ids_beyond_the_vocabulary_are_refused_though_their_checksum_is_right(workplace: Path, lm: Run) -> None:
    Path("corpus").mkdir()
    save_tokenizer(Path("corpus"), ByteTokenizer())
    writer = ShardWriter(Path("corpus"), ByteTokenizer(), 10_000)
    for split, last in {"train": 257, "val": 256}.items():
        writer.append(split, np.append(np.zeros(999), last).astype("<u2").tobytes(), np.zeros(1, np.int64))
    writer.commit({})
    writer.finish({"documents": 2, "bytes": 1, "replaced": 0})
    code, _, error = lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "corpus")
    assert code == 2 and "train-00000.tokens: has id 257, its tokenizer's vocabulary has 257" in error.splitlines()[-1]
    with pytest.raises(UserError, match="has id 257"):
        shards.verify(Path("corpus"))


def test_documents_that_start_outside_are_refused(workplace: Path) -> None:
    Path("corpus").mkdir()
    save_tokenizer(Path("corpus"), ByteTokenizer())
    for starts in ([0, 2000], [5, 3], [-1, 4]):
        writer = ShardWriter(Path("corpus"), ByteTokenizer(), 10_000)
        writer.tokens["train"], writer.documents["train"] = 0, 0
        writer._add(writer._part("train", 0), np.zeros(1000).astype("<u2").tobytes(), start=True)
        writer._add(writer._starts("train", 0), np.array(starts, "<i8").tobytes())
        writer._name("train", 0, 1000)
        path = Path("corpus/train-00000.tokens")
        with pytest.raises(UserError, match="its documents start outside of it, or out of order"):
            verification.check(path, shards.read_header(path))
        path.unlink()


def test_a_shard_is_read_through_once_and_when_it_is_first_opened(
    corpus: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, check = [], verification.check
    monkeypatch.setattr(verification, "check", lambda path, header: (read.append(path.name), check(path, header)))
    first = shards.open_corpus(corpus).splits["train"]
    assert not read
    assert len(first[:10]) == 10 and read == ["train-00000.tokens"]
    assert len(first[6000:6010]) == 10 and len(first[:10]) == 10
    assert read == ["train-00000.tokens", "train-00001.tokens"]
    again = shards.open_corpus(corpus).splits["train"]  # as another process would
    assert len(again[:10]) == 10 and len(read) == 2
    stat = (corpus / "train-00000.tokens").stat()
    flip(corpus / "train-00000.tokens")
    os.utime(corpus / "train-00000.tokens", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # hides nothing
    with pytest.raises(UserError, match="its checksum is wrong"):
        shards.open_corpus(corpus).splits["train"][:10]
    monkeypatch.setenv("LM_DATA_HOME", "/proc/nowhere")  # where nothing can be noted, each process looks for itself
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert len(shards.open_corpus(corpus).splits["train"][6000:6010]) == 10 and read[-1] == "train-00001.tokens"


def test_a_damaged_cache_of_a_text_is_made_anew(workplace: Path) -> None:
    fractions = {"val_fraction": 0.1, "test_fraction": 0.0}
    whole = token_cache.load_tokens("text.txt", "char", **fractions).splits["train"][:].tolist()
    (path,) = (workplace / "data" / "tokens").glob("*/train-00000.tokens")
    flip(path)
    assert token_cache.load_tokens("text.txt", "char", **fractions).splits["train"][:].tolist() == whole


def test_a_damaged_copy_of_a_remote_shard_is_copied_anew(corpus: Path) -> None:
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in corpus.iterdir():
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    whole = shards.open_corpus(corpus).splits["train"][:].tolist()
    for damage in (flip, lambda path: path.write_bytes(b"")):
        opened = remote.Remote.open("memory://bucket")
        assert shards.open_corpus(opened.folder, opened).splits["train"][:].tolist() == whole
        damage(opened.folder / "train-00000.tokens")
        assert shards.open_corpus(opened.folder, opened).splits["train"][:].tolist() == whole


def test_documents_apart_are_checked_too(corpus: Path) -> None:
    flip(corpus / "train-00000.tokens", at=2 * 6000 + 1)  # not a token, but where a document starts
    data = TextData(corpus=str(corpus), block_size=8, across_documents=False)
    data.setup("fit")
    with pytest.raises(UserError, match="its checksum is wrong"):
        data.training_examples()
