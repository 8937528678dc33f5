"""Everything that only a GPU can show, by one command: eight minutes on one H100, and figures after each measurement.

    python benchmarks/gpu/all.py [--parts steps resume …] [--size full|small] [--minutes 8] [--output DIR]

Each part runs in a process of its own, with its own time limit: one that fails or takes too long is recorded with its
error and with what it had measured, and the next one runs. DIR/all.json is written anew after every measurement, so
that a call that is cut off keeps them; DIR is $OUT by default. On a CPU, --size small takes a few minutes.

README.md beside this says how to take all of it to a machine that has PyTorch and no network.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Part(NamedTuple):
    """What is measured, in at most how many seconds of an H100."""

    seconds: int
    what: str


PARTS = {  # the recipe comes last: it takes all the time that is left
    "machine": Part(30, "the card, its speed at products and copies"),
    "steps": Part(170, "GPT-2 124M by autograd, through the Trainer"),
    "by_hand": Part(120, "the same by hand"),
    "plain": Part(60, "the same in a plain loop"),
    "resume": Part(170, "SIGKILL and resume, to the last bit"),
    "sampling": Part(40, "tokens a second"),
    "tests": Part(60, "the tests marked cuda"),
    "recipe": Part(240, "configs/shakespeare.yaml to its best loss"),
}


class Report:
    """What was found so far, on the disk as well."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = folder / "all.json", folder / "all.log"
        self.found: dict[str, Any] = {"size": size, "parts": {}}

    def write(self) -> None:
        """Write all of it, whole or not at all."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1))
        beside.replace(self.path)


def measure(name: str, size: str, limit: float, report: Report) -> None:
    """Run a part in a process of its own, which prints a line of JSON for each measurement."""
    part: dict[str, Any] = {"what": PARTS[name].what, "ok": False, "seconds": 0.0, "error": "", "rows": []}
    report.found["parts"][name] = part
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", "benchmarks.gpu.part", name, "--size", size, "--seconds", str(limit)]
    began, late = time.monotonic(), threading.Event()
    with report.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,
        )

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            part["rows"].append(json.loads(line))
            report.write()
        code = process.wait()
        timer.cancel()
    part["seconds"] = round(time.monotonic() - began, 1)
    part["ok"] = code == 0
    if code:
        said = report.log.read_bytes()[start:].decode(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), f"exit code {code}")
        part["error"] = f"stopped after {limit:.0f} s" if late.is_set() else last
    report.write()


def show(name: str, part: dict[str, Any]) -> None:
    """Print what a part found."""
    print(f"== {name}: {part['what']}, {part['seconds']} s{'' if part['ok'] else ': ' + part['error']}")
    for row in part["rows"]:
        cells = (f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("   " + "  ".join(cells))
    sys.stdout.flush()


def main() -> int:
    """Run the parts; return 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--minutes", type=float, default=8.0, help="After which nothing runs any more.")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or "gpu"), metavar="DIR")
    options = parser.parse_args()
    if home := os.environ.get("LM_DATA_HOME"):  # parts have folders of their own
        os.environ["LM_DATA_HOME"] = str(Path(home).resolve())
    report, until = Report(options.output, options.size), time.monotonic() + 60 * options.minutes
    for name in options.parts:
        limit = until - time.monotonic()
        if options.size == "full":
            limit = min(limit, PARTS[name].seconds)
        if limit < 10:
            print(f"== {name}: no time is left")
            continue
        measure(name, options.size, limit, report)
        show(name, report.found["parts"][name])
    return int(not all(part["ok"] for part in report.found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
