"""A file or folder counts as lm's only by its contents, or as what a kill has left under a run's own names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from lm import outputs
from lm.checkpoints import checkpoint, owned, runs
from lm.errors import UserError
from tests.conftest import ROOT
from tests.support.samples import CONTENTS

FIXTURES = ROOT / "tests/fixtures"


def saved(value: object, path: Path) -> bytes:
    """Save a value as lm does, to a file object: the archive's first record is archive/data.pkl."""
    with path.open("wb") as file:
        torch.save(value, file)
    return path.read_bytes()


def without_checksums(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        saved({"model": torch.nn.Linear(2, 2), "epoch": 3}, path)
    finally:
        torch.serialization.set_crc32_options(True)


def distributed(path: Path) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=path, no_dist=True)


def disk_image(path: Path) -> None:
    path.write_bytes(bytes(32768) + b"\x01CD001" + bytes(2048))


OTHERS: dict[str, Callable[[Path], object]] = {
    "a disk image": disk_image,
    "a distributed checkpoint": distributed,
    "a text": lambda path: saved("a film about lm", path),
    "a list": lambda path: saved(["lm"], path),
    "a dict with another lm": lambda path: saved({"lm": torch.ones(3)}, path),
    "a dict without a tokenizer": lambda path: saved(CONTENTS | {"lm": {"vocab_size": 2, "block_size": 4}}, path),
    "an archive without checksums": without_checksums,
}
LEFT: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path.touch(),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "two bytes": lambda path: path.write_bytes(b"PK"),
    "a part": lambda path: path.write_bytes(saved(CONTENTS, path)[:-100]),
    "a part of another's": lambda path: path.write_bytes(saved({"epoch": 3}, path)[:100]),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["last.ckpt", "step=0000005.ckpt", ".last.ckpt.12ab.part", "out.ckpt"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_another_program_wrote_is_not_ours_whatever_its_name(tmp_path: Path, kind: str, name: str) -> None:
    OTHERS[kind](path := tmp_path / name)
    assert owned.is_foreign(path) and not owned.is_ours(path)
    with pytest.raises(UserError, match="was not written by lm"):
        checkpoint.write(CONTENTS, path)
    runs.clear(tmp_path)
    assert path.exists()


@pytest.mark.parametrize("kind", LEFT)
def test_what_a_kill_left_is_ours_only_under_the_names_of_a_run(tmp_path: Path, kind: str) -> None:
    for name in ("out.ckpt", "thesis", "step=notes.ckpt", "last.ckpt.zip", ".thesis.12ab.part"):
        LEFT[kind](path := tmp_path / name)
        assert owned.is_foreign(path), name
    for name in ("last.ckpt", "best.ckpt", "step=0000005.ckpt"):
        LEFT[kind](path := tmp_path / name)
        with pytest.raises(UserError, match=r"no checkpoint of lm's"):  # as an --output
            outputs.check_free(path, made="checkpoint", ours=owned.is_ours, overwrite=True)
        checkpoint.write(CONTENTS, path)
        checkpoint.verify(path)
    LEFT[kind](part := tmp_path / ".best.ckpt.12ab.part")
    runs.clear(tmp_path)
    assert not part.exists()


def test_what_nothing_proves_to_be_ours_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, torn = tmp_path / "last.ckpt", []
    for length in (100, 200):
        torn.append(saved(CONTENTS, path)[:length])
        path.write_bytes(torn[-1])
        checkpoint.write(CONTENTS, path)
        checkpoint.verify(path)
    assert [(tmp_path / f"last.ckpt.damaged{number}").read_bytes() for number in ("", "2")] == torn
    assert f"note: {path} is damaged: it is kept as {path}.damaged\n" in capsys.readouterr().err


def test_a_flipped_bit_does_not_make_ours_anothers(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    data = bytearray(saved(CONTENTS, path))
    data[data.index(b"global_step")] ^= 1
    path.write_bytes(data)
    assert owned.is_left(path) and not owned.is_ours(path)


def test_a_sharded_one_is_ours_by_its_lm_pt(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    shutil.copytree(FIXTURES / "sharded/last.ckpt", folder)
    assert owned.is_ours(folder) and owned.is_ours(FIXTURES / "single/last.ckpt")
    (folder / "lm.pt").write_bytes(b"torn")
    assert not owned.is_ours(folder) and owned.is_left(folder)
    assert owned.is_foreign(folder.rename(tmp_path / "out.ckpt"))


def test_a_file_written_over_in_place_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    data = saved(CONTENTS, path)
    assert owned.is_ours(path)
    path.write_bytes(data.replace(b"global_step", b"other_thing"))  # of the same length
    assert not owned.is_ours(path)
