import errno
import os
import random
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from lm.checkpoints import checkpoint, disk, owned, runs
from lm.errors import UserError
from lm.training.checkpoint_io import AtomicCheckpointIO
from tests.support.cases import often
from tests.support.samples import CONTENTS


def write(path: Path, **changed: object) -> Path:
    checkpoint.write({**CONTENTS, **changed}, path)
    return path


def test_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "last.ckpt")
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(checkpoint.load(path)["state_dict"]["weight"], CONTENTS["state_dict"]["weight"])
    assert checkpoint.damage(path) is None


def test_what_was_found_whole_is_read_ahead_once(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    io = AtomicCheckpointIO(path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["weight"], CONTENTS["state_dict"]["weight"])
    path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"last.ckpt: it is truncated"):
        io.load_checkpoint(path)


def test_no_record_is_opened_while_another_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on, that would make whole records seem damaged."""
    path, calls = write(tmp_path / "last.ckpt"), []
    opening, reading = zipfile.ZipFile.open, zipfile.ZipExtFile.read

    def open_(self: zipfile.ZipFile, *arguments: object) -> object:
        calls.append("open")
        return opening(self, *arguments)

    def read(self: zipfile.ZipExtFile, *arguments: int) -> bytes:
        calls.append("read")
        return reading(self, *arguments)

    with zipfile.ZipFile(path) as archive, monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", open_)
        patch.setattr(zipfile.ZipExtFile, "read", read)
        assert checkpoint._torn(archive) is None
    assert calls.index("read") == calls.count("open") > 4


def test_a_flipped_bit_is_seen_wherever_it_changes_anything(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.ckpt").read_bytes()
    draw = random.Random(0)
    path = tmp_path / "flipped.ckpt"
    found = 0
    for _ in range(300):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        if checkpoint.damage(path):
            found += 1
        else:  # padding, dates: then what is read must be equal
            loaded = torch.load(path, weights_only=True)
            assert torch.equal(loaded["state_dict"]["weight"], CONTENTS["state_dict"]["weight"])
            assert loaded["lm"] == CONTENTS["lm"] and loaded["global_step"] == 5
    assert found > 250


@pytest.mark.parametrize("bit", often([4, 0, 7]))
def test_a_flipped_bit_in_the_archives_directory_is_seen(tmp_path: Path, bit: int) -> None:
    whole = write(tmp_path / "whole.ckpt").read_bytes()
    path = tmp_path / "flipped.ckpt"
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        if not checkpoint.damage(path):
            loaded = checkpoint.load(path)
            assert torch.equal(loaded["state_dict"]["weight"], CONTENTS["state_dict"]["weight"]), place


def test_a_truncated_file_is_seen_at_every_length(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.ckpt").read_bytes()
    path = tmp_path / "short.ckpt"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert checkpoint.damage(path)


def test_foreign_files_are_refused_with_the_whole_one_beside_them(tmp_path: Path) -> None:
    write(tmp_path / "step=0000005.ckpt")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"model": torch.zeros(3)}, foreign)
    archive = tmp_path / "zip.ckpt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello", "world")
    for path in (foreign, archive, tmp_path / "missing.ckpt"):
        with pytest.raises(UserError, match=rf"checkpoint {path}: .*; {tmp_path}/step=0000005.ckpt is whole"):
            checkpoint.load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**CONTENTS, "evil": Evil()}, tmp_path / "evil.ckpt")
    assert checkpoint.damage(tmp_path / "evil.ckpt")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_newest_is_by_start_then_step(tmp_path: Path) -> None:
    write(tmp_path / "step=0000900.ckpt", global_step=900, start=1)
    write(tmp_path / "best.ckpt", global_step=500, start=2)
    write(tmp_path / "last.ckpt", global_step=500, start=2)
    (tmp_path / "step=0001000.ckpt").write_bytes(b"torn")
    names = [path.name for path in checkpoint.newest_first(tmp_path)]
    assert names == ["last.ckpt", "best.ckpt", "step=0000900.ckpt"]


def resolve(folder: Path, request: str | None) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    path = runs.resolve(folder, checkpoint.newest_first(folder), request, notes.append)
    return path and path.name, notes


def test_what_ckpt_path_means(tmp_path: Path) -> None:
    assert resolve(tmp_path, None) == (None, [])
    assert resolve(tmp_path, "auto") == (None, [])
    with pytest.raises(UserError, match="has no checkpoint"):
        resolve(tmp_path, "last")
    write(tmp_path / "step=0000005.ckpt")
    write(tmp_path / "last.ckpt", global_step=9)
    with pytest.raises(UserError, match="has checkpoints already: say `ckpt_path` last"):
        resolve(tmp_path, None)
    assert resolve(tmp_path, "last") == resolve(tmp_path, "auto") == ("last.ckpt", [])
    assert resolve(tmp_path, str(tmp_path / "step=0000005.ckpt")) == ("step=0000005.ckpt", [])
    with pytest.raises(UserError, match="there is no such file"):
        resolve(tmp_path, "nowhere.ckpt")


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "foreign"])
def test_last_falls_back_to_the_newest_whole_one_and_says_so(tmp_path: Path, harm: str) -> None:
    write(tmp_path / "step=0000005.ckpt")
    write(tmp_path / "step=0000007.ckpt", global_step=7)
    last = write(tmp_path / "last.ckpt", global_step=9)
    data = bytearray(last.read_bytes())
    if harm == "flip":
        data[data.index(torch.arange(3000.0).numpy().tobytes()) + 4000] ^= 1
    last.write_bytes({"truncate": data[:-100], "flip": data, "empty": b"", "foreign": b"hello" * 99}[harm])
    for request in ("last", "auto"):
        name, notes = resolve(tmp_path, request)
        assert name == "step=0000007.ckpt"
        assert "last.ckpt is damaged" in notes[0] and "step=0000007.ckpt" in notes[1]
    for path in tmp_path.iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        resolve(tmp_path, "last")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_leaves_the_previous_one_whole(small_disk: Path) -> None:
    path = write(small_disk / "last.ckpt")
    with pytest.raises(UserError, match=r"last.ckpt could not be written \(No space left on device\): .* MiB free"):
        write(path, state_dict={"weight": torch.zeros(1 << 20)})
    assert checkpoint.damage(path) is None
    assert [p.name for p in small_disk.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_seen_before_training(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(UserError, match="No space left on device"):
        disk.probe(small_disk)


def test_what_a_killed_process_left_is_cleared_by_who_has_the_run_alone(tmp_path: Path) -> None:
    checkpoint.write({"lm": {}}, tmp_path / "whole")
    (tmp_path / ".last.ckpt.123.part").write_bytes((tmp_path / "whole").read_bytes()[:200])
    (tmp_path / "whole").unlink()
    (tmp_path / ".probe.123").touch()
    disk.probe(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another process may be at it
    runs.clear(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        disk.probe(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", [".last.ckpt.12ab.part", ".probe.12ab"])
def test_what_lm_did_not_write_is_not_cleared_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work, nothing else\n" * 9)
    runs.clear(tmp_path)
    assert (tmp_path / name).read_text() == "years of work, nothing else\n" * 9


@pytest.mark.parametrize("call", ["rmdir", "unlink"])
def test_a_sharded_checkpoint_that_is_half_removed_has_not_its_name(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step=0000002.ckpt"
    folder.mkdir()
    for name in ("lm.pt", "checksums.json", "__0_0.distcp", ".metadata"):
        (folder / name).write_bytes(b"x")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(OSError, match="No space"):
        owned.remove(folder)
    assert not folder.exists()
    monkeypatch.undo()
    runs.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_removed_does_not_undo_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("last.ckpt", ".last.ckpt.new.part"):
        (tmp_path / name).mkdir()
        torch.save(CONTENTS, tmp_path / name / "lm.pt")
    (tmp_path / name / "checksums.json").write_bytes(b"new")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        owned.take_place(tmp_path / ".last.ckpt.new.part", tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt/checksums.json").read_bytes() == b"new"
    runs.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
