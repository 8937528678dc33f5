"""Prepared corpora, served: orders, document borders, mixtures, remote storage."""

import itertools
import json
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.corpus import remote, shards
from lm.corpus.prepare import Preparation, prepare
from lm.data import TextData
from lm.data.examples import IGNORED, Documents, Mixture, Running, permuted
from lm.errors import UserError

Run = Callable[..., tuple[int, str, str]]


def make(folder: Path, name: str, mark: str, documents: int = 120) -> Path:
    """A corpus of bytes, in shards of 500 tokens, whose documents are of many lengths and begin with a mark."""
    lines = [json.dumps({"text": f"{mark}{i:03}" + "x" * (i * 7 % 60)}) for i in range(documents)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    prepare(Preparation([str(folder / f"{name}.jsonl")], "byte", folder / name, shard_tokens=500, workers=1))
    return folder / name


@pytest.fixture
def corpus(workplace: Path) -> Path:
    return make(workplace, "a", "a")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), below=st.integers(1, 300), epoch=st.integers(0, 10**6))
def test_a_permutation_has_each_place_once_an_epoch(seed: int, below: int, epoch: int) -> None:
    numbers = np.arange(epoch * below, (epoch + 2) * below)
    epochs, places = permuted(seed, numbers, below)
    assert epochs.tolist() == [epoch] * below + [epoch + 1] * below
    assert sorted(places[:below]) == sorted(places[below:]) == list(range(below))
    assert np.array_equal(permuted(seed, numbers[below // 2 :], below)[1], places[below // 2 :])


def test_permutations_differ_by_epoch_and_seed_and_look_random() -> None:
    n = 10_000
    _, places = permuted(1, np.arange(2 * n), n)
    other = permuted(2, np.arange(n), n)[1]
    assert (places[:n] == places[n:]).sum() < 10 and (places[:n] == other).sum() < 10
    assert abs(np.corrcoef(np.arange(n), places[:n])[0, 1]) < 0.05
    assert abs(np.corrcoef(places[:-1][:n], places[1 : n + 1])[0, 1]) < 0.05


def test_a_permutation_serves_each_token_once_over_shards(corpus: Path) -> None:
    tokens = shards.open_corpus(corpus).splits["train"]
    assert len(tokens.shards) > 3
    chunks = (len(tokens) - 1) // 16
    running = Running(tokens, 16, "permutation", 5)
    for epoch in range(3):
        x, y = running(np.arange(epoch * chunks, (epoch + 1) * chunks))
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen, whole = Counter(map(tuple, y.tolist())), tokens[:].tolist()
        assert any(
            Counter(tuple(whole[i : i + 16]) for i in range(1 + phase, 1 + phase + chunks * 16, 16)) == seen
            for phase in range((len(tokens) - 1) % 16 + 1)
        )


@pytest.mark.parametrize("order", ["random", "permutation"])
def test_no_chunk_crosses_a_document(corpus: Path, order: str) -> None:
    tokens = shards.open_corpus(corpus).splits["train"]
    documents = Documents(tokens, tokens, 16, order, 5)  # type: ignore[arg-type]
    x, y = documents(np.arange(len(documents)))
    assert not (x == 256).any()  # the end of text is a target alone
    assert torch.equal(x[:, 1:][y[:, 1:] != IGNORED], y[:, :-1][y[:, 1:] != IGNORED])
    if order == "permutation":
        starts = tokens.starts(0, tokens.documents + 1).tolist()
        expected = Counter(itertools.chain(*(tokens[a + 1 : b].tolist() for a, b in itertools.pairwise(starts))))
        assert Counter(y[y != IGNORED].tolist()) == expected


def test_documents_are_counted_in_groups(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = shards.open_corpus(make(workplace, "many", "m", 3000)).splits["train"]
    at_once = Documents(tokens, tokens, 16, "permutation", 0)
    assert len(at_once.ends) > 1
    monkeypatch.setattr("lm.data.examples.GROUP", 7)
    by_seven = Documents(tokens, tokens[:], 16, "permutation", 0)
    assert all(map(torch.equal, at_once(np.arange(999)), by_seven(np.arange(999))))


def test_a_mixture_has_its_shares_and_serves_each_corpus_in_order() -> None:
    def part(mark: int) -> Callable:
        return lambda numbers: (torch.from_numpy(numbers)[:, None] * 10 + mark,) * 2

    mixture = Mixture([part(0), part(1), part(2)], [5, 3, 2], seed=1)
    ids = mixture(np.arange(2500))[0][:, 0]
    assert Counter((ids[:1000] % 10).tolist()) == Counter({0: 500, 1: 300, 2: 200})
    for mark in range(3):
        mine = ids[ids % 10 == mark] // 10
        assert mine.tolist() == list(range(len(mine)))
    assert torch.equal(mixture(np.arange(990, 1010))[0][:, 0], ids[990:1010])
    assert len(set((ids[:1000] % 10)[:20].tolist())) > 1
    for weights in ([1, 0], [1, 1e-5]):
        with pytest.raises(UserError, match="at least a thousandth"):
            Mixture([part(0), part(1)], weights, seed=1)


def batches(data: TextData, count: int) -> list[torch.Tensor]:
    data.prepare_data()
    data.setup("fit")
    loader = iter(data.train_dataloader())
    return [torch.stack(next(loader)) for _ in range(count)]


@pytest.mark.parametrize("across_documents", [True, False])
@pytest.mark.parametrize("order", ["random", "permutation"])
@pytest.mark.parametrize("held", [1 << 20, 0])
def test_workers_and_held_corpora_change_nothing(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, order: str, across_documents: bool, held: int
) -> None:
    how = {"block_size": 8, "batch_size": 4, "order": order, "across_documents": across_documents}
    made = batches(TextData(corpus=str(corpus), **how), 20)  # type: ignore[arg-type]
    monkeypatch.setattr(shards, "HELD", held)
    again = batches(TextData(corpus=f"file://{corpus}", num_workers=2, **how), 20)  # type: ignore[arg-type]
    assert all(map(torch.equal, made, again))


def test_corpora_mix_by_weight_and_validate_together(corpus: Path, workplace: Path) -> None:
    other = make(workplace, "b", "b", 40)
    data = TextData(corpus={str(corpus): 3, str(other): 1}, block_size=8, batch_size=100)
    made = torch.stack(batches(data, 10))
    assert made.shape == (10, 2, 100, 8)
    val = [shards.open_corpus(folder).splits["val"][:].tolist() for folder in (corpus, other)]
    served = [y for _, y in data.val_dataloader()]
    assert torch.cat([y.flatten() for y in served]).tolist() == [*val[0], *val[1]][1:]
    data = TextData(corpus={str(corpus): 3, "text.txt": 1}, block_size=8)
    with pytest.raises(UserError, match="another tokenizer"):
        batches(data, 1)


def test_validation_by_documents_covers_them_once(corpus: Path) -> None:
    data = TextData(corpus=str(corpus), block_size=8, across_documents=False)
    batches(data, 1)
    tokens = data.corpora[0].splits["val"]
    starts = tokens.starts(0, tokens.documents + 1).tolist()
    expected = [t for a, b in itertools.pairwise(starts) for t in tokens[a + 1 : b].tolist()]
    assert [t for _, y in data.val_dataloader() for t in y[y != IGNORED].tolist()] == expected


def test_another_tokenizer_than_the_shards_is_refused(corpus: Path, lm: Run) -> None:
    for tokenizer in ("char", "gpt9"):
        with pytest.raises(UserError, match="prepared with a tokenizer of 257 ids|tokenizer gpt9"):
            batches(TextData(corpus=str(corpus), tokenizer=tokenizer), 1)
    assert len(batches(TextData(corpus=str(corpus), tokenizer="byte", block_size=8), 1)) == 1
    lm("fit", "--config", "tiny.yaml")  # a checkpoint of characters
    code, _, error = lm("fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_steps", 20,
                        "--data.init_args.corpus", corpus)  # fmt: skip
    assert code == 2 and "tokenizer" in error and len(error.splitlines()) == 1


def test_prepare_fit_validate_sample(corpus: Path, lm: Run) -> None:
    assert lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", corpus)[0] == 0
    assert lm("validate", "--ckpt_path", "checkpoints/tiny/last.ckpt")[0] == 0
    shutil.rmtree(corpus)  # a checkpoint has its tokenizer
    code, out, _ = lm("sample", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--prompt", "é", "--max_new_tokens", 5)
    assert code == 0 and out.startswith("é")


@pytest.mark.slow
def test_gpt2_on_shakespeare_with_the_network_cut(
    reference: Path, lm: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("the network is cut")

    monkeypatch.setenv("LM_DATA_HOME", str(reference))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    source = reference / "tinyshakespeare.txt"
    code, out, _ = lm("prepare", "--source", source, "--tokenizer", "gpt2", "--output", "out", "--workers", 1, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["tokens"] == 301_966 + 36_059
    short = ("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1)  # logits of 50,257 ids take their time
    assert lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "out", *short)[0] == 0
    code, out, _ = lm("sample", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--prompt", "hii there", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["text"][0].startswith("hii there")


def test_a_shard_cut_while_it_is_read_is_an_error(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = shards.open_corpus(corpus).splits["train"]
    assert len(tokens[:20]) == 20
    (corpus / "train-00000.tokens").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00000.tokens: it was cut while"):
        tokens[:20]


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest, corpus: Path, workplace: Path) -> str:
    if request.param == "local":  # as a mounted bucket; file:// itself is read in place
        return f"local://{corpus}"
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in corpus.iterdir():
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return "memory://bucket"


def test_remote_shards_are_copied_when_they_are_read(url: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "HELD", 0)
    copied = []
    fetch = remote.Remote.fetch
    monkeypatch.setattr(remote.Remote, "fetch", lambda s, path, c: (copied.append(path.name), fetch(s, path, c))[1])
    opened = remote.Remote.open(url)
    tokens = shards.open_corpus(opened.folder, opened).splits["train"]
    assert not copied
    assert tokens[600:620].tolist() == shards.open_corpus(corpus).splits["train"][600:620].tolist()
    assert copied == ["train-00001.tokens"]
    here = batches(TextData(corpus=str(corpus), block_size=8, batch_size=4), 20)
    there = batches(TextData(corpus=url, block_size=8, batch_size=4), 20)
    assert all(map(torch.equal, here, there))
    assert not [path for path in opened.folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_remote_shard_is_named(corpus: Path, workplace: Path) -> None:
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in corpus.iterdir():
        data = path.read_bytes()
        system.pipe_file(f"/bucket/{path.name}", data[:-1] + b"x" if path.suffix == ".tokens" else data)
    with pytest.raises(UserError, match=r"memory://bucket/train-00000.tokens: its checksum is wrong"):
        batches(TextData(corpus="memory://bucket", block_size=8, batch_size=4), 1)
    for url, message in (("memory://nothing", "no prepared corpus"), ("nosuch://x", "Protocol not known")):
        with pytest.raises(UserError, match=message):
            batches(TextData(corpus=url), 1)
