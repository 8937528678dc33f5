"""Sweeps that are run, killed and compared."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import yaml

from lm.checkpoints import checkpoint
from tests.support.processes import start
from tests.support.runs import assert_equal

DATA: dict[str, Any] = {
    "class_path": "lm.data.TextData",
    "init_args": {"corpus": "text.txt", "block_size": 8, "batch_size": 4},
}
RECIPE = {
    "seed_everything": 7,
    "trainer": {"max_steps": 40, "val_check_interval": 10, "log_every_n_steps": 10, "accelerator": "cpu", "devices": 1},
    "model": {
        "class_path": "lm.training.LanguageModel",
        "init_args": {
            "net": {"class_path": "lm.models.Bigram"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": DATA,
    "checkpoint": {"every_n_steps": 10},
    "samples": {"max_new_tokens": 0},
    "figures": {"every_n_steps": 0},
}
RATE = "model.init_args.optimizer.init_args.lr"
SWEEP = {
    "recipe": "recipe.yaml",
    "settings": {RATE: {"low": 1e-3, "high": 1.0, "log": True}, "data.init_args.batch_size": [4, 8]},
    "trials": 3,
}


def write(folder: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> None:
    """Write recipe.yaml and sweep.yaml."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))


def begin(folder: Path, *more: object, **settings: Any) -> subprocess.Popen[str]:
    """Start a sweep."""
    environment = {"LM_DATA_HOME": str(folder / "data"), **settings.pop("environment", {})}
    return start("sweep", "--config", "sweep.yaml", *more, cwd=folder, environment=environment, **settings)


def run(folder: Path, *more: object, **settings: Any) -> dict[str, Any]:
    """Run a sweep to its end, and return what it says in JSON."""
    process = begin(folder, "--json", *more, **settings)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def trials(folder: Path, name: str = "sweep") -> list[Any]:
    """Return a sweep's trials as Optuna itself reads them."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "sweeps" / name / "journal.log")))
    return optuna.load_study(study_name=name, storage=storage).trials


def picture(folder: Path, name: str = "sweep") -> list[Any]:
    """Return all of a sweep's trials that must be equal in two of them."""
    return [
        (one.number, one.state.name, one.params, one.value, one.intermediate_values, one.user_attrs.get("reason"))
        for one in trials(folder, name)
    ]


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the last checkpoints of all trials, bit by bit."""
    names = sorted(path.name for path in (one / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (other / "checkpoints").iterdir()) and names
    for name in names:
        states = [checkpoint.load(place / "checkpoints" / name / "last.ckpt") for place in (one, other)]
        for state in states:
            del state["start"], state["loops"]
            for key in ("name", "trainer", "checkpoint"):
                del state["lm"]["config"][key]
        assert_equal(*states)


def processes_of(folder: Path) -> dict[int, str]:
    """Return the processes that work in a folder, each with what it is: sweep, server, trial or rank."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            where = os.readlink(place / "cwd")
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if where == str(folder) and int(place.name) != os.getpid():
            found[int(place.name)] = (parent, "lm.cli.forks" in words)
    server = {pid for pid, (parent, forks) in found.items() if forks and not (parent in found and found[parent][1])}
    return {pid: "server" if pid in server else "trial" if forks else "sweep" for pid, (parent, forks) in found.items()}


def kill(folder: Path, kind: str) -> bool:
    """Kill a sweep's processes of a kind; return whether there were any."""
    pids = [pid for pid, what in processes_of(folder).items() if what == kind]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)
