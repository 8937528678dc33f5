"""What cannot be read is said as itself: the file that is wrong, and sources that are left out."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lm.corpus import shards
from lm.corpus.prepare import Preparation, prepare
from lm.errors import UserError

TEXT = "a text of some words\n" * 50


def corpus(folder: Path) -> Path:
    (folder / "text.txt").write_text(TEXT)
    prepare(Preparation([str(folder / "text.txt")], "byte", folder / "out", workers=1))
    return folder / "out"


def test_a_flipped_byte_of_a_manifest_is_blamed_on_it(tmp_path: Path) -> None:
    path = corpus(tmp_path) / "manifest.json"
    good = path.read_bytes()
    blamed = []
    for at in [at for at, byte in enumerate(good) if byte not in b" \n"]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with (
            pytest.raises(UserError)
            if at < good.index(b'"sha256": "', len(good) - 90)
            else suppress(UserError) as found
        ):
            shards.verify(path.parent)
        blamed += [str(found.value)] if found else []
    assert all(said.startswith(f"{path}: damaged") for said in blamed), blamed


def test_an_older_manifest_that_names_another_tokenizer_is_blamed(tmp_path: Path) -> None:
    path = corpus(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    shards.verify(path.parent)
    path.write_text(json.dumps(manifest | {"tokenizer": manifest["tokenizer"][::-1]}))
    with pytest.raises(UserError, match=r"manifest.json: damaged \(names another tokenizer\)"):
        shards.open_corpus(path.parent)


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
