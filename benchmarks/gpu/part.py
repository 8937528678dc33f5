"""One part of benchmarks/gpu/all.py, in its own process: a line of JSON for each measurement on standard output."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import runs, speed

Row = dict[str, Any]
PARTS: dict[str, Callable[[str, float, Callable[[Row], None]], None]] = {
    "machine": speed.machine,
    "steps": speed.steps,
    "by_hand": speed.by_hand,
    "plain": speed.plain,
    "resume": runs.resume,
    "sampling": speed.sampling,
    "tests": runs.tests,
    "recipe": runs.recipe,
}


def main() -> None:
    """Run the part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--size", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints something, a Trainer say, prints to the log
    sys.stdout = sys.stderr

    def say(row: Row) -> None:
        print(json.dumps(row), file=rows, flush=True)

    PARTS[options.name](options.size, options.seconds, say)


if __name__ == "__main__":
    main()
