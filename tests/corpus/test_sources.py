"""Sources that are left out are said."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.corpus import shards, source_files

TEXT = "a text of some words\n" * 50


@pytest.mark.parametrize("source", ["texts", "texts/**"])
def test_links_to_nowhere_and_loops_are_counted_and_named_where_errors_are_skipped(
    lm: Callable[..., tuple[int, str, str]], workplace: Path, source: str
) -> None:
    inner = workplace / "texts" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.txt").write_text(TEXT)
    dead = [inner / "dead.txt", inner.parent / "gone.jsonl", inner.parent / "round.txt"]
    dead[0].symlink_to("nowhere.txt")
    dead[1].symlink_to("/nowhere/else")
    dead[2].symlink_to("round.txt")
    for command in (
        ("prepare", "--tokenizer", "byte", "--output", "out", "--json"),
        ("tokenizer", "--vocab_size", 260, "--output", "a.tiktoken", "--json"),
    ):
        words = (*command, "--source", source)
        code, _, err = lm(*words)
        assert code == 2 and "which is not there" in err and "--errors skip" in err, err
        code, _, err = lm(*words, "--errors", "skip")
        assert code == 0, err
        (line,) = (line for line in err.splitlines() if "could not be read" in line)
        assert line.startswith("note: 3 sources could not be read and are left out: ")
        assert "dead.txt (a link to nowhere.txt, which is not there)" in line
        assert "gone.jsonl" in line and "round.txt (a loop of symbolic links)" in line
    assert shards.open_corpus(Path("out")).manifest["documents"] == 1
    for path in dead[1:]:
        path.unlink()
    (inner / "back").symlink_to("..")
    code, _, err = lm("prepare", "--tokenizer", "byte", "--output", "two", "--source", "texts", "--errors", "skip")
    assert code == 0 and "note: 2 sources could not be read" in err and "leads back to" in err


def test_hidden_files_and_pipes_in_a_folder_are_counted_and_named(
    lm: Callable[..., tuple[int, str, str]], workplace: Path
) -> None:
    folder = workplace / "texts"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", ".git/c.txt"):
        (folder / name).write_text(TEXT)
    os.mkfifo(folder / "pipe.txt")
    assert source_files.find(["texts"]) == [Path("texts/a.txt")]
    code, _, err = lm("prepare", "--source", "texts", "--tokenizer", "byte", "--output", "out")
    kinds = ".jsonl, .ndjson, .parquet, .txt, .md, hidden, or a pipe"
    names = "texts/.git, texts/.hidden.txt, texts/pipe.txt (a path or a glob takes any)"
    assert code == 0 and f"note: 3 files are left out, of another kind than {kinds}: {names}" in err, err
