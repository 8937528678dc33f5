import hashlib
import http.server
import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest

from lm import storage
from lm.corpus import formats, shards, sources, token_cache
from lm.errors import UserError

SPLIT = {"val_fraction": 0.1, "test_fraction": 0.0}


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "train", "val", "vocabulary"),
    [("shakespeare", "char", 1_003_854, 111_540, 65), ("shakespeare", "gpt2", 301_966, 36_059, 50_257)],
)
def test_reference_counts(
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    corpus: str,
    tokenizer: str,
    train: int,
    val: int,
    vocabulary: int,
) -> None:
    monkeypatch.setattr(storage, "tokens_home", lambda: tmp_path)
    tokens = token_cache.load_tokens(corpus, tokenizer, **SPLIT)
    assert (len(tokens.splits["train"]), len(tokens.splits["val"]), tokens.tokenizer.n_vocab) == (
        train,
        val,
        vocabulary,
    )
    text = (reference / "tinyshakespeare.txt").read_text()
    assert (
        tokens.tokenizer.decode(tokens.splits["val"][:200])
        == text[1_003_854:][: len(tokens.tokenizer.decode(tokens.splits["val"][:200]))]
    )


def test_a_second_start_only_opens(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = token_cache.load_tokens("text.txt", "char", **SPLIT)
    monkeypatch.setattr(token_cache, "_write", lambda *a: pytest.fail("tokenized again"))
    monkeypatch.setattr(formats, "documents", lambda *a: pytest.fail("read again"))
    second = token_cache.load_tokens("text.txt", "char", **SPLIT)
    assert all(np.array_equal(first.splits[name][:], second.splits[name][:]) for name in shards.SPLITS)
    assert second.splits["train"].dtype == np.uint16


def test_changed_text_tokenizer_or_split_is_prepared_anew(workplace: Path) -> None:
    sizes = {
        len(token_cache.load_tokens("text.txt", "char", val_fraction=share, test_fraction=0.1).splits["train"])
        for share in (0.1, 0.2)
    }
    (workplace / "text.txt").write_text("another text " * 99)
    sizes.add(len(token_cache.load_tokens("text.txt", "char", val_fraction=0.1, test_fraction=0.1).splits["train"]))
    assert len(sizes) == 3


def test_torn_token_files_are_made_again(workplace: Path) -> None:
    whole = token_cache.load_tokens("text.txt", "char", **SPLIT).splits["train"][:]
    (file,) = (workplace / "data" / "tokens").glob("*/train-00000.tokens")
    file.write_bytes(file.read_bytes()[:-7])
    assert np.array_equal(token_cache.load_tokens("text.txt", "char", **SPLIT).splits["train"][:], whole)


def _load(_: int) -> int:
    return int(token_cache.load_tokens("text.txt", "char", **SPLIT).splits["train"][:].sum())


def test_processes_that_prepare_at_once_agree(workplace: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(_load, range(8)))) == 1
    assert len(list((workplace / "data" / "tokens").iterdir())) == 1


def test_a_read_only_data_folder_is_left_alone(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = workplace / "data"
    home.mkdir(mode=0o555)
    monkeypatch.setenv("HOME", str(workplace / "home"))
    token_cache.load_tokens("text.txt", "char", **SPLIT)
    assert not list(home.iterdir())
    assert list((workplace / "home/.cache/lm/tokens").iterdir())


def test_folders_and_json_lines(workplace: Path) -> None:
    folder = workplace / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_text('{"text": "two\\nlines"}\n\n{"text": "three"}\n')
    (folder / "deep" / "c.txt").write_text("four")
    (folder / "a.md").write_text("one")
    (folder / "ignored.bin").write_bytes(b"\xff")
    assert sources.find("corpus").read() == "one\ntwo\nlines\nthree\nfour"
    (folder / "b.jsonl").write_text('{"text": "two"}\n{"body": 3}\n')
    with pytest.raises(UserError, match=r'b.jsonl, line 2: expected a JSON object with text under "text"'):
        sources.find("corpus").read()


def test_embedded_corpora_need_nothing() -> None:
    assert len(sources.find("python-docs").read()) > 400_000
    sums = sources.find("arithmetic").read().splitlines()
    assert len(sums) == 50_000
    assert all(eval(line.replace("=", "==")) for line in sums[:1000])


@pytest.fixture
def server(tmp_path: Path):
    """A real HTTP server on the loopback; yields its address."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(b"contents")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_download_once_under_a_pinned_hash(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_DATA_HOME", str(tmp_path / "home"))
    digest = hashlib.sha256(b"contents").hexdigest()
    assert storage.fetch("file", f"{server}/file", digest).read_bytes() == b"contents"
    assert storage.fetch("file", "http://127.0.0.1:9/never-asked", digest).read_bytes() == b"contents"
    (tmp_path / "home" / "file").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the file that file should be"):
        storage.fetch("file", f"{server}/file", digest)


@pytest.mark.parametrize(("path", "message"), [("file", "another SHA-256"), ("missing", "404")])
def test_a_wrong_download_leaves_nothing(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setenv("LM_DATA_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=message):
        storage.fetch("file", f"{server}/{path}", "0" * 64)
    assert not list((tmp_path / "home").iterdir())


def test_the_same_bytes_under_another_suffix_are_another_text(workplace: Path) -> None:
    for name in ("same.txt", "same.jsonl"):
        (workplace / name).write_text('{"text": "abab\u2028cdcd"}\n' * 50)
    as_text, as_lines = (
        token_cache.load_tokens(name, "char", **SPLIT).tokenizer.n_vocab for name in ("same.txt", "same.jsonl")
    )
    assert as_lines == 6  # abcd, the line separator inside the string, and the newline between texts
    assert as_text > as_lines


def test_parquet(workplace: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "zwei", "三"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, "corpus.parquet")
    assert sources.find("corpus.parquet").read() == "one\nzwei\n三"
    pyarrow.parquet.write_table(table.drop(["text"]), "corpus.parquet")
    with pytest.raises(UserError, match=r'corpus.parquet: has no column "text"; it has id'):
        sources.find("corpus.parquet").read()
    (workplace / "corpus.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"corpus.parquet: not a whole Parquet file"):
        sources.find("corpus.parquet").read()
