"""A manifest that was damaged is blamed itself."""

import json
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
