"""The faults that training runs meet in practice, for `faults.py`: each is a function that hits a job."""

import contextlib
import glob
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
WORDS = ("fit", "--config", "faults.yaml", "--ckpt_path", "auto", "--trainer.devices", "2")


class Job:
    """A run and its newest process, the first rank."""

    def __init__(self, folder: Path, name: str, *words: str) -> None:
        self.folder, self.name = folder, name
        self.checkpoints = folder / "checkpoints" / name
        self.start(*words)

    def start(self, *words: str) -> None:
        """Start or resume it, with more words on its command line."""
        self.process = self.launch(*words)

    def launch(self, *more: str) -> subprocess.Popen[bytes]:
        """Start a process for it."""
        words = [sys.executable, "-m", "lm", *WORDS, "--name", self.name, *more]
        return subprocess.Popen(
            words, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=(self.folder / f"{self.name}.err").open("ab"), start_new_session=True,
        )  # fmt: skip

    def ranks(self) -> list[int]:
        """Return the processes of the ranks; the second is there a few seconds after the first."""
        pid, found = self.process.pid, []
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                    found.append(int(child))
        return [pid, *found]

    def signal_a_rank(self, *signals: signal.Signals) -> None:
        """Send one of the signals to one of the ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(self.ranks()), random.choice(signals))

    def last_file(self) -> Path | None:
        """Return the newest checkpoint, or a file of it where it is sharded."""
        last = self.checkpoints / "last.ckpt"
        files = sorted(last.iterdir()) if last.is_dir() else [last] if last.exists() else []
        return random.choice(files) if files else None

    def kill(self) -> None:
        """Send SIGKILL to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, seconds: float) -> bool:
        """Wait for all processes to end; return whether they did, and end them if not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None and not alive(self.process.pid):
                return True
            time.sleep(0.02)
        self.kill()
        self.process.wait()
        return False


def alive(group: int) -> list[str]:
    """Return the processes of a group that live, or are stopped."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number, *_ = path.read_text().rpartition(")")[2].split()
            if int(number) == group and state != "Z":
                found.append(path.parent.name)
    return found


def listens(process: int) -> bool:
    """Return whether a process catches signals yet, SIGUSR1 say; one that has gone counts as well."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return True
    return caught is None or bool(int(caught[1], 16) >> signal.SIGUSR1 - 1 & 1)


Fault = Callable[[Job], Iterator[None]]
"""Does the damage, then yields; repairs what must be repaired when it continues."""


def kill_a_rank(job: Job) -> Iterator[None]:
    job.signal_a_rank(signal.SIGKILL)
    yield


def kill_the_job(job: Job) -> Iterator[None]:
    job.kill()
    yield


def kill_the_job_in_a_save(job: Job) -> Iterator[None]:
    while job.process.poll() is None and not glob.glob(f"{job.checkpoints}/.*.part"):
        pass
    time.sleep(random.uniform(0, 0.003))  # writing takes a few milliseconds
    job.kill()
    yield


def stop_a_rank(job: Job) -> Iterator[None]:
    while job.process.poll() is None and len(job.ranks()) < 2:  # before that, no other rank can notice
        time.sleep(0.01)
    job.signal_a_rank(signal.SIGSTOP)
    yield


def terminate_a_rank(job: Job) -> Iterator[None]:
    while job.process.poll() is None and not all(map(listens, job.ranks())):  # Python itself is still starting
        time.sleep(0.001)
    job.signal_a_rank(signal.SIGTERM, signal.SIGUSR1)
    yield


def close_the_terminal(job: Job) -> Iterator[None]:
    while job.process.poll() is None and not all(map(listens, job.ranks())):
        time.sleep(0.001)
    for _ in range(2):  # the shell and the kernel both send it, to all
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGHUP)
    yield


def fill_the_disk(job: Job) -> Iterator[None]:
    filler = job.checkpoints.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    yield
    filler.unlink()


def remount(folder: Path, how: str) -> bool:
    return not subprocess.run(["mount", "-o", f"remount,{how}", folder], capture_output=True).returncode


def forbid_writing(job: Job) -> Iterator[None]:
    while job.process.poll() is None and not remount(job.checkpoints.parent, "ro"):
        time.sleep(0.001)  # busy while a file is being written
    yield
    remount(job.checkpoints.parent, "rw")


def truncate(job: Job) -> Iterator[None]:
    job.kill()
    yield
    if last := job.last_file():
        os.truncate(last, random.randrange(last.stat().st_size))


def flip_a_bit(job: Job) -> Iterator[None]:
    job.kill()
    yield
    if last := job.last_file():
        with last.open("r+b") as file:
            file.seek(random.randrange(last.stat().st_size))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << random.randrange(8)]))


def jump_in_time(job: Job) -> Iterator[None]:
    (job.folder / "clock").write_text(random.choice(("+40d", "-40d", "+2h", "-2h")))
    yield
    (job.folder / "clock").write_text("+0")


def start_another(job: Job) -> Iterator[None]:
    second = job.launch()
    if job.process.poll() is None and second.wait() != 2:  # the first may have ended before the second looked
        job.end(60)
        assert job.process.returncode == 0, "two jobs at work on one run"
    second.wait()
    yield


FAULTS: dict[str, tuple[Fault, set[int] | None]] = {  # and the exit codes that are right; None for any
    "SIGKILL of a rank": (kill_a_rank, None),
    "SIGKILL of the whole job": (kill_the_job, None),
    "SIGKILL of the whole job while it saves": (kill_the_job_in_a_save, None),
    "SIGTERM or SIGUSR1 to a rank": (terminate_a_rank, {143}),
    "SIGHUP to the whole job, twice": (close_the_terminal, {129}),
    "SIGSTOP of a rank": (stop_a_rank, None),
    "disk full": (fill_the_disk, {2}),
    "checkpoints read-only, then back": (forbid_writing, {2}),
    "last checkpoint truncated": (truncate, None),
    "a bit of the last checkpoint flipped": (flip_a_bit, None),
    "the clock jumps": (jump_in_time, {0}),
    "a second job on the same run": (start_another, {0}),
}


def possible(fault: Fault, folder: Path) -> str | None:
    """Return what a fault needs that this machine lacks."""
    if fault in (fill_the_disk, forbid_writing) and not os.path.ismount(folder / "checkpoints"):
        return "needs root"
    if fault is jump_in_time and not LIBRARY:
        return "needs Debian's package faketime"
    return None
