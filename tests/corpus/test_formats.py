"""Texts as people have them: with marks, in many suffixes, with rows that have none, and hostile ones."""

import codecs
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.corpus import formats, source_files, sources
from lm.corpus.formats import zstd
from lm.errors import UserError
from tests.conftest import start
from tests.support.cases import often

Run = Callable[..., tuple[int, str, str]]
BOM = codecs.BOM_UTF8
LINES = "".join(json.dumps({"text": f"Document {i}, naïve."}) + "\n" for i in range(40)).encode()
TEXT = "".join(f"Line {i}, naïve.\n" for i in range(400)).encode()


def documents(path: Path, **settings: object) -> list[str]:
    return list(formats.documents(path, formats.Settings(**settings)))


def json_of(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("packed", [lambda data: data, gzip.compress, zstd.compress], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize(("suffix", "data"), [("txt", TEXT), ("jsonl", LINES), ("ndjson", LINES), ("md", TEXT)])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, packed: Callable, suffix: str, data: bytes) -> None:
    for name, content in {"with": BOM + data, "without": data}.items():
        (tmp_path / f"{name}.{suffix}").write_bytes(packed(content))
    assert documents(tmp_path / f"with.{suffix}") == documents(tmp_path / f"without.{suffix}")
    (tmp_path / f"joined.{suffix}").write_bytes(packed(data + BOM + data))
    if data is LINES:
        assert len(documents(tmp_path / f"joined.{suffix}")) == 80


def test_nor_is_it_on_the_way_through_the_commands(workplace: Path, lm: Run) -> None:
    Path("with.txt").write_bytes(BOM + TEXT)
    Path("without.txt").write_bytes(TEXT)
    Path("only.txt").write_bytes(BOM)
    for name in ("with", "without"):
        assert lm("prepare", "--source", f"{name}.txt", "--tokenizer", "char", "--output", name, "--workers", 1)[0] == 0
    assert Path("with/train-00000.tokens").read_bytes() == Path("without/train-00000.tokens").read_bytes()
    words = ("prepare", "--source", "-", "--tokenizer", "char", "--output", "piped")
    with Path("with.txt").open("rb") as file:
        assert start(*words, cwd=workplace, stdin=file).wait(100) == 0
    assert Path("piped/train-00000.tokens").read_bytes() == Path("without/train-00000.tokens").read_bytes()
    code, _, error = lm("prepare", "--source", "only.txt", "--tokenizer", "char", "--output", "only")
    assert code == 2 and "it is empty" in error
    assert "\ufeff" not in sources.find("with.txt").read()
    words_of_fit = ("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "with.txt")
    assert lm(*words_of_fit, "--trainer.max_steps", 1)[0] == 0
    Path("prompt.txt").write_bytes(BOM + b"Line")
    code, out, _ = lm("sample", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--prompt_file", "prompt.txt", "--json")
    assert code == 0 and json_of(out)["text"][0].startswith("Line")


def test_a_wrong_byte_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(BOM + b'{"text": "' + b"x" * 7 + b'\xff"}')
        with pytest.raises(UserError, match="byte 0xff at offset 20: convert the file to UTF-8$"):
            documents(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_utf_16_is_refused_in_a_line(tmp_path: Path, name: str, encoding: str) -> None:
    data = ("" if encoding in ("utf-16", "utf-32") else "\ufeff").encode(encoding) + LINES.decode().encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for errors in ("strict", "replace", "skip"):
        with pytest.raises(UserError, match="in UTF-16 or UTF-32, as its first bytes say: convert"):
            documents(tmp_path / name, errors=errors)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson", "a.json", "a.JSON.GZ", "a.jsonl.ZST"])
def test_suffixes_say_the_format_whatever_their_case(tmp_path: Path, name: str) -> None:
    packed = {"GZ": gzip.compress, "ZST": zstd.compress}.get(name.rpartition(".")[2], lambda data: data)
    (tmp_path / name).write_bytes(packed(LINES))
    assert len(documents(tmp_path / name)) == 40


def test_what_a_folder_leaves_out_is_counted_and_named(workplace: Path, lm: Run) -> None:
    folder = workplace / "texts"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.TXT", "deep/b.md", "c.Txt"):
        (folder / name).write_bytes(TEXT)
    for name in ("a.pdf", "deep/b.csv", "c.json", "d", "e.html"):
        (folder / name).write_bytes(b"x")
    assert [path.name for path in source_files.find([str(folder)])] == ["a.TXT", "c.Txt", "b.md"]
    note = "note: 5 files are left out, of another kind than .jsonl, .ndjson, .parquet, .txt, .md: "
    code, _, error = lm("prepare", "--source", "texts", "--tokenizer", "byte", "--output", "out", "--workers", 1)
    assert code == 0 and note + "texts/a.pdf, texts/c.json, texts/d, …" in error
    code, _, error = lm("tokenizer", "--source", "texts", "--vocab_size", 270, "--output", "t.tiktoken")
    assert code == 0 and note in error
    code, _, error = lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "texts", "--trainer.max_steps", 1)
    assert code == 0 and error.count(note) == 1


WRONG = [
    *("null", "7", "[1]", "{}", '{"text": null}', '{"text": 7}', '{"text": ["a"]}', '{"other": "a"}', "{", '"text"'),
    *('{"text": "\\ud800"}', "[" * 100_000, '{"text": ' + "9" * 5000 + "}", "\ufeffx", '{"text": "a"} x'),
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_rows_without_text_are_an_error_or_counted(workplace: Path, lm: Run, wrong: str) -> None:
    Path("a.jsonl").write_text(LINES.decode() + wrong + "\n" + LINES.decode() + wrong + "\n")
    words = ("prepare", "--source", "a.jsonl", "--tokenizer", "byte", "--output", "out", "--workers", 1, "--json")
    code, _, error = lm(*words)
    assert code == 2 and error.startswith("error: a.jsonl, line 41: ") and "--text_key" in error and len(error) < 500
    code, out, error = lm(*words[:6], "skipped", *words[7:], "--errors", "skip")
    done = json_of(out)
    assert code == 0 and (done["documents"], done["skipped"]) == (80, 2) and "2 rows without text were left" in error
    assert lm(*words[:6], "skipped", *words[7:], "--errors", "skip")[0] == 0
    if wrong in WRONG[::5]:
        code, _, error = lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "a.jsonl")
        assert code == 2 and "a.jsonl, line 41: " in error and "--" not in error  # fit has no such option


def test_bytes_that_are_no_utf_8_are_skipped_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "\xff"}\n' + LINES)
    assert len(documents(tmp_path / "a.jsonl", errors="skip")) == 80


@pytest.mark.parametrize("kind", ["null", "int", "list", "struct", "column", "bytes", "cut", "empty", "text"])
def test_parquet_of_another_form(workplace: Path, lm: Run, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    good = [f"Document {i}" for i in range(3000)]
    tables = {
        "null": {"text": [*good, None, *good]},
        "int": {"text": [1, 2, 3]},
        "list": {"text": [["a"], ["b"]]},
        "struct": {"text": [{"a": 1}]},
        "column": {"other": good, "text.x": good},
        "bytes": {"text": [b"\xff", b"a"]},
    }
    path = Path("a.parquet")
    pq.write_table(pa.table(tables.get(kind, {"text": good})), path, row_group_size=500)
    if kind in ("cut", "empty", "text"):
        path.write_bytes({"cut": path.read_bytes()[:-1000], "empty": b"", "text": TEXT}[kind])
    words = ("prepare", "--source", path, "--tokenizer", "byte", "--workers", 1, "--json", "--output")
    code, _, error = lm(*words, "out")
    assert code == 2 and error.startswith("error: a.parquet") and len(error.splitlines()) == 1
    assert kind != "null" or 'row 3001: its column "text" has null' in error
    if kind == "null":
        code, out, _ = lm(*words, "skipped", "--errors", "skip")
        assert code == 0 and (json_of(out)["documents"], json_of(out)["skipped"]) == (6000, 1)


def test_a_wrong_row_never_aborts(workplace: Path) -> None:
    """Arrow's threads read on while the error ended the process: "terminate called", exit 134, every second time."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a" * 100, None] * 20_000}), "a.parquet", row_group_size=100)
    words = ("prepare", "--source", "a.parquet", "--tokenizer", "byte", "--workers", 1, "--output")
    for process in [start(*words, f"out{i}", cwd=workplace) for i in range(8)]:
        _, error = process.communicate(timeout=100)
        assert process.returncode == 2 and len(error.splitlines()) == 1, error


def test_pipes_devices_and_links_to_nowhere(workplace: Path, lm: Run) -> None:
    folder = workplace / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT)
    (folder / "folder.txt").mkdir()
    (folder / "folder.txt" / "b.txt").write_bytes(TEXT)
    os.mkfifo(folder / "pipe.txt")
    os.mkfifo("pipe.jsonl")
    assert len(source_files.find([str(folder)])) == 2
    Path("dead.txt").symlink_to("nowhere.txt")
    expected = {"pipe.jsonl": "a pipe or a device", "dead.txt": "a link to nowhere.txt, which is not there",
                "/dev/zero": "a pipe or a device"}  # fmt: skip
    for source, message in expected.items():
        for command in (
            ("prepare", "--source", source, "--tokenizer", "byte", "--output", "out"),
            ("tokenizer", "--source", source, "--vocab_size", 300, "--output", "a.tiktoken"),
            ("fit", "--config", "tiny.yaml", "--data.init_args.corpus", source),
        ):
            code, _, error = lm(*command)
            assert code == 2 and message in error.splitlines()[-1] and source in error.splitlines()[-1], error
    (folder / "folder.txt" / "dead.txt").symlink_to("gone.txt")
    code, _, error = lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "texts")
    assert code == 2 and "source texts/folder.txt/dead.txt: a link to gone.txt, which is not there" in error


HOSTILE = {
    "nul.txt": b"a\0b" * 2000,
    "empty.txt": b"",
    "only.jsonl": BOM,
    "invalid.txt": TEXT + b"\xff\xfe",
    "cut.txt": TEXT + "é".encode()[:1],
    "surrogate.txt": TEXT + b"\xed\xa0\x80",
    "nul.jsonl": b'{"text": "a\\u0000b"}\n' * 500,
    "nul-byte.jsonl": LINES + b"\0\n",
    "long.jsonl": b'{"text": "' + b"a b " * (1 << 18) + b'"}\n',
    "long-and-wrong.jsonl": b"a" * (2 << 20),
}


@pytest.mark.parametrize("name", often(HOSTILE, [*HOSTILE][::2].__contains__))
def test_hostile_texts_end_in_a_line_or_in_tokens(workplace: Path, lm: Run, name: str) -> None:
    Path(name).write_bytes(HOSTILE[name])
    for command in (
        ("prepare", "--source", name, "--tokenizer", "byte", "--output", "out", "--workers", 1, "--val_fraction", 0),
        ("tokenizer", "--source", name, "--vocab_size", 257, "--output", "a.tiktoken"),
        ("fit", "--config", "tiny.yaml", "--data.init_args.corpus", name, "--trainer.max_steps", 1),
    ):
        code, _, error = lm(*command)
        assert code in (0, 2) and "Traceback" not in error
        assert code == 0 or (error.splitlines()[-1].startswith("error: ") and len(error.splitlines()[-1]) < 400)
        assert (code == 0) == (name in ("nul.txt", "nul.jsonl", "long.jsonl")) or command[0] == "tokenizer", error


def test_one_text_is_one_document_and_an_empty_validation_split_is_said(workplace: Path, lm: Run) -> None:
    words = ("prepare", "--source", "text.txt", "--tokenizer", "byte", "--workers", 1, "--output")
    code, out, _ = lm(*words, "one")
    assert code == 0 and "of 1 document," in out and "note" not in out
    code, out, _ = lm(*words, "none", "--val_fraction", 0)
    assert code == 0 and "note: no text fell to validation" in out
    code, _, error = lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "none")
    last = error.splitlines()[-1]
    assert code == 2 and "its val split has 0 tokens" in last and "prepare it with a larger share for val" in last
