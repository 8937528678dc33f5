"""What `lm doctor` finds, on this machine as it is and as it is made."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm.cli import doctor
from tests.conftest import start


def findings(lm, *words: object) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, _ = lm("doctor", "--json", *words)
    return code, {one["name"]: one for one in json.loads(out.splitlines()[-1])["findings"]}


def test_here_training_would_work(lm, workplace: Path) -> None:
    code, found = findings(lm)
    assert code == 0
    assert found["torch"]["verdict"] == found["loopback"]["verdict"] == found["memory"]["verdict"] == "ok"
    assert found["checkpoints"]["value"].startswith("writable")
    assert not Path("checkpoints").exists()  # it leaves nothing behind
    code, out, err = lm("doctor")
    assert code == 0 and not err and "torch.compile on cpu" in out


@pytest.fixture
def read_only(workplace: Path) -> Iterator[Path]:
    folder = workplace / "checkpoints"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", folder]).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_written_to_fails(lm, read_only: Path) -> None:
    code, out, err = lm("doctor")
    assert code == 1 and err == "error: training would fail here: checkpoints: see the lines with X\n"
    (line,) = [line for line in out.splitlines() if line.startswith("X ")]
    assert "checkpoints cannot be written to (Read-only file system)" in line


@pytest.mark.slow
def test_too_few_open_files_fail(workplace: Path) -> None:
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))}
    process = start("doctor", "--json", cwd=workplace, fresh=True, **few)
    out, err = process.communicate(timeout=60)
    found = {one["name"]: one for one in json.loads(out.splitlines()[-1])["findings"]}
    assert process.returncode == 1 and "open files" in err
    assert found["open files"]["value"] == "at most 60" and "ulimit -n" in found["open files"]["advice"]


def test_what_the_environment_says_of_the_network_is_tried(
    lm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing7")
    code, found = findings(lm)
    assert code == 1 and found["MASTER_ADDR"]["verdict"] == "fail"
    assert found["chosen interface"]["value"] == "there is no nothing7"


def test_installed_packages_are_held_against_a_lock(workplace: Path) -> None:
    lock = workplace / "some.lock"
    lock.write_text("torch==0.0.1 \\\n    --hash=sha256:00\nnot-there==1.0\n")
    found = doctor.locked(lock)
    assert found.verdict == "fail" and "for 0.0.1" in found.value and "not-there missing for 1.0" in found.value
    assert "pytest" in found.value  # installed, and not in the lock


@pytest.mark.parametrize("text", [None, "", "nothing here"])
def test_a_lock_that_is_none_is_one_line(lm, workplace: Path, text: str | None) -> None:
    if text is not None:
        (workplace / "some.lock").write_text(text)
    code, _, err = lm("doctor", "--lock", "some.lock")
    assert code == 2 and err.startswith("error: --lock some.lock: ") and len(err.splitlines()) == 1


def test_packages_of_the_wrong_release_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=99", "nowhere-at-all", "x; extra == 'dev'"])
    found = {one.name: one for one in doctor.versions()}
    assert found["torch"].verdict == found["nowhere-at-all"].verdict == "fail" and "x" not in found


@pytest.mark.parametrize(("ahead", "expected"), [(0, "ok"), (3600, "before the newest log"), (-10, "ok")])
def test_a_clock_behind_the_logs_is_noted(workplace: Path, ahead: int, expected: str) -> None:
    table = workplace / "logs/run/metrics.csv"
    table.parent.mkdir(parents=True)
    table.write_text("step\n")
    now = doctor.time.time()
    os.utime(table, (now + ahead, now + ahead))
    found = next(doctor.clock())
    assert expected in (found.verdict, *found.value.split(", "))


def test_a_clock_that_nothing_sets_is_noted_in_plain_words(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_kept_right", lambda: False)
    found = list(doctor.clock())[-1]
    assert (found.name, found.value) == ("clock synchronization", "none, as far as the kernel knows")
    assert found.verdict == "note" and "chrony or ntpd" in found.advice
