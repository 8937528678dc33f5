"""Files are there whole or not at all, homes are found or said to be missing, and an error names what it is about."""

import errno
import os
from pathlib import Path

import pytest

from lm import outputs, storage
from lm.checkpoints import disk
from lm.corpus import source_files, sources
from lm.errors import UserError


def test_a_file_that_fails_leaves_no_part_and_says_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with storage.whole(path) as file:
            file.write(b"new")
            os.unlink(file.name)  # so that removing it fails too
            raise OSError(errno.EIO, "the first")

    with pytest.raises(OSError, match="the first") as found:
        fail()
    assert found.value.errno == errno.EIO and path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_part_never_overwrites_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "01234567")
    mine = tmp_path / ".a.01234567.part"
    mine.write_text("the user's")
    with pytest.raises(FileExistsError):
        storage.write_whole(tmp_path / "a", b"new")
    assert mine.read_text() == "the user's"


def test_a_lock_with_content_is_the_users(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("the user's")
    with storage.alone(tmp_path / ".lock", "busy"):
        pass
    assert (tmp_path / ".lock").read_text() == "the user's"
    (tmp_path / ".other").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"\.other could not be opened"), storage.alone(tmp_path / ".other", "busy"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    monkeypatch.delenv("LM_DATA_HOME", raising=False)
    own = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "lm"
    for home in (None, ""):
        monkeypatch.setenv("HOME", "")
        if home is None:
            monkeypatch.delenv("HOME")
        assert storage.data_home() == own
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.data_home() == tmp_path / ".cache" / "lm"
    for home in ("/", "relative"):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(UserError, match="LM_DATA_HOME"):
            storage.data_home()
    monkeypatch.setenv("LM_DATA_HOME", "~nobody-of-that-name/x")
    with pytest.raises(UserError, match="whole path"):
        storage.data_home()


def test_nobody_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LM_DATA_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    with pytest.raises(UserError, match=r"HOME is not set.*LM_DATA_HOME"):
        storage.tokens_home()


def test_folders_that_were_made_and_are_empty_go_again(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with storage.folder_made(tmp_path / "mine", tmp_path / "a" / "b", tmp_path / "a" / "c"):
        (tmp_path / "a" / "c" / "file").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "c", "file", "mine"]


def test_a_folder_is_removed_only_where_all_in_it_is_known(tmp_path: Path) -> None:
    for extra in ("thesis.txt", "sub"):
        folder = tmp_path / extra
        folder.mkdir()
        (folder / "known").touch()
        (folder / extra).mkdir() if extra == "sub" else (folder / extra).touch()
        with pytest.raises(UserError, match="other files"):
            storage.remove_folder(folder, "known")
        assert sorted(p.name for p in folder.iterdir()) == sorted(["known", extra])
    (tmp_path / "link").symlink_to("thesis.txt")
    with pytest.raises(UserError, match="other files"):
        storage.remove_folder(tmp_path / "link", ".*")


def test_a_dead_link_is_said_as_itself(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "gone.txt").symlink_to("nowhere.txt")
    expected = r"texts/gone\.txt: a link to nowhere\.txt, which is not there"
    with pytest.raises(UserError, match=expected):
        source_files.find([str(tmp_path / "texts")])
    assert outputs.kind(tmp_path / "texts" / "gone.txt") == "a link to nowhere.txt, which is not there"


def test_an_error_names_what_it_is_about(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/self/mem: "), disk.full_disk_is_a_user_error(tmp_path / "logs"):
        sources.find("/proc/self/mem")  # it opens, and cannot be read
    with pytest.raises(UserError, match=r"^corpus\.txt: Perm"), disk.full_disk_is_a_user_error(tmp_path / "logs"):
        raise PermissionError(errno.EACCES, "", "corpus.txt")
    for name in (None, str(tmp_path / "logs" / "metrics.csv")):
        with (
            pytest.raises(UserError, match=r"logs.* could not be written to \(No space"),
            disk.full_disk_is_a_user_error(tmp_path / "logs"),
        ):
            raise OSError(errno.ENOSPC, "", name)
