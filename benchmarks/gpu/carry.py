"""Make the ignored folder .carry at the root of the repository: what a GPU machine without a network lacks.

    LM_DATA_HOME=... python benchmarks/gpu/carry.py [--python 3.12] [--more NAME …]

It has the data that the recipes read, and wheels of the packages that lm needs beside torch, lightning, torchmetrics,
tiktoken, tensorboard and pytest, in the versions of constraints.txt. Then it prints the command for the machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("jsonargparse", "docstring-parser", "typeshed-client", "backports-zstd")
DATA = ("tinyshakespeare.txt", "gpt2.tiktoken")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
COMMAND = (
    "python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .carry/wheels/*.whl && "
    "PYTHONPATH=/tmp/site LM_DATA_HOME=.carry/data python3 benchmarks/gpu/all.py"
)


def pinned(names: list[str]) -> list[str]:
    """Return each package with its version in constraints.txt, where it has one."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    return [f"{name}=={versions[name]}" if name in versions else name for name in names]


def main() -> None:
    """Fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="The machine's.")
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME", help="Further packages that it lacks.")
    options = parser.parse_args()
    home = Path(os.environ.get("LM_DATA_HOME") or "~/.cache/lm").expanduser()
    missing = [name for name in DATA if not (home / name).is_file()]
    if missing:
        raise SystemExit(f"LM_DATA_HOME {home} lacks {', '.join(missing)}: lm fit with corpus shakespeare fetches them")
    folder = ROOT / ".carry"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for name in DATA:
        shutil.copyfile(home / name, folder / "data" / name)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", options.python, "--implementation", "cp", "--dest", str(folder / "wheels")]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*words, *pinned([*PACKAGES, *options.more])], check=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder.name}: {size / 2**20:.1f} MiB; take it along with the repository, and there run\n\n{COMMAND}")


if __name__ == "__main__":
    main()
