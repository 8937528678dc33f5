"""A sweep at work on one machine: starts trials, hears their evaluations, gives up hopeless ones, counts failures.

All that it must not forget is in the storage before it goes on, so it can be killed at any moment.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from lm import storage
from lm.checkpoints import checkpoint, disk
from lm.errors import UserError
from lm.experiments.processes import Processes, memory_kills
from lm.experiments.space import recipe_with, short_names
from lm.experiments.study import Trials

KILLS = 5  # of a trial without a new checkpoint between them, after which it counts as failed


@dataclass
class Work:
    """A trial at work.

    Args:
        trial: Which.
        run: The number of its run, where it has several seeds.
        seconds: What its earlier processes took.
        kills: How often it was killed since its last checkpoint.
        saved: The time of that.
    """

    trial: FrozenTrial
    run: int = 0
    seconds: float = 0.0
    kills: int = 0
    saved: float = 0.0
    given_up: bool = False
    reports: dict[int, float] = field(default_factory=dict)
    oom: int = 0


class Sweep:
    """Runs a sweep's trials.

    Args:
        trials: What is known of them.
        folder: The sweep's folder.
        workers: How many run at a time.
        processes: Starts them.
        say: Prints a line, with fields for machines.
    """

    def __init__(
        self, trials: Trials, folder: Path, workers: int, processes: Processes, say: Callable[..., None]
    ) -> None:
        self.trials, self.spec, self.folder, self.say = trials, trials.spec, folder, say
        self.workers, self.processes = workers, processes
        self.slots: dict[int, Work] = {}
        self.left_over: list[FrozenTrial] = []
        """Trials that a process which has ended left running."""
        self.names = short_names([setting.name for setting in self.spec.settings])
        self.exhausted = False

    def run(self) -> None:
        """Run trials until there are enough."""
        while True:
            for slot in range(self.workers):
                if slot not in self.slots and (work := self._next()) is not None:
                    self.slots[slot] = work
                    self._begin(slot)
            if not self.slots:
                return
            for slot, message in self.processes.hear(5.0):
                if "code" in message:
                    self._ended(slot, **message)
                elif slot in self.processes.running:
                    self.processes.running[slot].answer(self._reported(self.slots[slot], message))

    # -- which trial is next

    def _next(self) -> Work | None:
        while self.left_over:
            trial = self.left_over.pop(0)
            work = Work(trial, len(trial.user_attrs.get("values", [])), trial.user_attrs.get("seconds", 0.0))
            work.reports = {int(step): value for step, value in trial.user_attrs.get("reports", {}).items()}
            if work.run == self.spec.seeds:
                self._complete(work)
            else:
                return work
        if self._enough():
            return None
        added = self.trials.add()
        self.exhausted = added is None
        return None if added is None else Work(added)

    def _enough(self) -> bool:
        """Return whether no more trials are to begin."""
        found = self.trials.all()
        steps = sum(trial.user_attrs.get("steps", 0) for trial in found)
        seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in found)
        return (
            len(found) >= self.spec.trials
            or self.exhausted
            or (self.spec.steps is not None and steps >= self.spec.steps)
            or (self.spec.minutes is not None and seconds >= 60 * self.spec.minutes)
        )

    # -- a trial's process

    def run_name(self, work: Work) -> str:
        """Return the name of a trial's run."""
        name = f"trial-{work.trial.number:04d}"
        return name if self.spec.seeds == 1 else f"{name}-seed-{work.run}"

    def _begin(self, slot: int) -> None:
        work = self.slots[slot]
        name = self.run_name(work)
        recipe = self.spec.recipe_of(self.trials.values(work.trial))
        recipe["name"] = name
        recipe = recipe_with(recipe, {"trainer.default_root_dir": str(self.folder)})
        if self.spec.seeds > 1:
            recipe["seed_everything"] = int(recipe.get("seed_everything", 1337)) + work.run
        file = self.folder / "recipes" / f"{name}.yaml"
        write_yaml(file, recipe)
        work.oom = memory_kills()
        self.processes.begin(
            slot,
            recipe=str(file),
            output=str(self.folder / "recipes" / f"{name}.log"),
            settings={self.names[key]: value for key, value in self.trials.values(work.trial).items()},
            **share(slot, self.workers),
        )

    def _reported(self, work: Work, message: dict[str, Any]) -> bool:
        """Store an evaluation, and return whether the run is to stop there."""
        step = message["step"]
        if "resumed" in message:
            return self._was_to_stop(work, step)
        found = message["values"]
        work.given_up = False
        self.trials.note(work.trial, steps=step + self._earlier_steps(work), metrics=found)
        if self.spec.metric not in found:
            known = ", ".join(sorted(found))
            raise UserError(f"{self.spec.metric}: it is not logged, or not finite: there are {known}")
        value = found[self.spec.metric]
        work.reports[step] = value
        if self.spec.seeds == 1:
            self.trials.report(work.trial, step, value)
            work.given_up = self._hopeless(work, step)
        else:
            self.trials.note(work.trial, reports=work.reports)
        return work.given_up or self._reached(work, step)

    def _was_to_stop(self, work: Work, step: int) -> bool:
        """Return whether a run that resumes at a step was to stop there."""
        known = self.trials.newest(work.trial).intermediate_values if self.spec.seeds == 1 else work.reports
        if step not in known:
            return False
        work.given_up = self.spec.seeds == 1 and self._hopeless(work, step)
        return work.given_up or (isinstance(self.spec.at, int) and step >= self.spec.at)

    def _earlier_steps(self, work: Work) -> int:
        recipe = self.spec.recipe_of(self.trials.values(work.trial))
        return work.run * int((recipe.get("trainer") or {}).get("max_steps", 0))  # a recipe may have it as a text

    def _hopeless(self, work: Work, step: int) -> bool:
        return self.spec.pruner != "none" and self.trials.hopeless(work.trial, step)

    def _reached(self, work: Work, step: int) -> bool:
        """Return whether the objective is read at this step, so that the run need not go on."""
        at = self.spec.at
        if isinstance(at, dict):
            return self._seconds(work) >= 60 * at["minutes"]
        return isinstance(at, int) and step >= at

    def _seconds(self, work: Work) -> float:
        began = [one.began for slot, one in self.processes.running.items() if self.slots[slot] is work]
        return work.seconds + sum(time.monotonic() - moment for moment in began)

    def _ended(self, slot: int, code: int, seconds: float) -> None:
        """Act on the end of a trial's process."""
        work = self.slots[slot]
        work.seconds = round(work.seconds + seconds, 3)
        self.trials.note(work.trial, seconds=work.seconds)
        name = self.run_name(work)
        stopped = code < 0 or code > 128
        if stopped and memory_kills() == work.oom and self._may_go_on(work, name):
            self.say(f"trial {work.trial.number}: {_cause(code)}: it goes on from its last checkpoint", level="warning")
            self._begin(slot)
            return
        del self.slots[slot]
        if code:
            said = "out of memory" if stopped and memory_kills() > work.oom else last_words(self.folder, name, code)
            full = [text for text in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)) if text in said]
            if full or disk.is_full(self.folder):  # no fault of the trial's: it goes on once there is room
                what = said if full else f"{os.strerror(errno.ENOSPC)}: make room"
                raise UserError(f"trial {work.trial.number}: {what}; then the same command goes on")
            self.trials.note(work.trial, reason=said)
            self._finish(work, TrialState.FAIL, reason=said)
        elif work.given_up:
            self._finish(work, TrialState.PRUNED)
        else:
            self._run_done(work, slot)

    def _may_go_on(self, work: Work, name: str) -> bool:
        """Return whether a run that was killed is to be started again: unless that comes to nothing."""
        last = self.folder / "checkpoints" / name / "last.ckpt"
        saved = last.stat().st_mtime if last.exists() else 0.0
        work.kills = 1 if saved > work.saved else work.kills + 1
        work.saved = saved
        return work.kills < KILLS

    def _run_done(self, work: Work, slot: int) -> None:
        """A run has come to its end: start the trial's next one, or complete the trial."""
        found = self.trials.newest(work.trial)
        reports = {**(found.intermediate_values if self.spec.seeds == 1 else {}), **work.reports}
        if not reports:
            self.trials.note(work.trial, reason="it was never evaluated")
            self._finish(work, TrialState.FAIL, reason="it was never evaluated: see trainer.val_check_interval")
            return
        values = [*found.user_attrs.get("values", []), self._objective(reports)]
        if self.spec.seeds > 1:
            self.trials.report(work.trial, work.run, values[-1])
        self.trials.note(work.trial, values=values, reports={})
        work.run, work.reports, work.kills = work.run + 1, {}, 0
        if work.run < self.spec.seeds and self._hopeless(work, work.run - 1):
            self._finish(work, TrialState.PRUNED)
        elif work.run < self.spec.seeds:
            self.slots[slot] = work
            self._begin(slot)
        else:
            self._complete(work)

    def _objective(self, reports: dict[int, float]) -> float:
        """Return a run's value, of those at its evaluations."""
        if self.spec.at == "best":
            return (max if self.spec.maximise else min)(reports.values())
        if isinstance(self.spec.at, int):
            return reports[min((step for step in reports if step >= self.spec.at), default=max(reports))]
        return reports[max(reports)]

    # -- the end of a trial

    def _complete(self, work: Work) -> None:
        values = self.trials.newest(work.trial).user_attrs["values"]
        self._finish(work, TrialState.COMPLETE, sum(values) / len(values))

    def _finish(self, work: Work, state: TrialState, value: float | None = None, reason: str = "") -> None:
        """Store how a trial ended, and print its line."""
        before = self.trials.best()
        self.trials.end(work.trial, state, value)
        best = self.trials.best()
        if best is not None and (before is None or best.number != before.number):
            recipe = self.spec.recipe_of(self.trials.values(best))
            write_yaml(self.folder / "best.yaml", {**recipe, "name": self.folder.name})
        found = self.trials.newest(work.trial)
        last = found.user_attrs.get("metrics", {}).get(self.spec.metric) if value is None else value
        shown = f"{self.spec.metric} {last:.4f}" if last is not None else " " * len(self.spec.metric)
        ends = {
            TrialState.PRUNED: f"given up at step {found.user_attrs.get('steps', 0)}",
            TrialState.FAIL: f"failed: {reason}",
        }
        better = "the best so far" if best is not None and best.number == found.number else ""
        settings = {self.names[key]: value for key, value in self.trials.values(found).items()}
        words = "  ".join(f"{key} {_short(value)}" for key, value in settings.items())
        self.say(
            f"trial {found.number:>3}  {shown}  {words}  {work.seconds:.0f} s  {ends.get(state, better)}".rstrip(),
            trial=found.number,
            state=state.name.lower(),
            value=value,
            settings=settings,
            seconds=work.seconds,
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cause(code: int) -> str:
    number = -code if code < 0 else code - 128
    try:
        return f"its process was stopped by {signal.Signals(number).name}"
    except ValueError:
        return f"its process ended with {code}"


def last_words(folder: Path, name: str, code: int) -> str:
    """Return why a run failed: the last error that it printed."""
    try:
        lines = (folder / "recipes" / f"{name}.log").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or [f"exit code {code}"])[-1][:300]


def share(slot: int, workers: int) -> dict[str, Any]:
    """Return a slot's share of the machine: cores, threads, and a GPU where there are some."""
    environment: dict[str, str] = {}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    if workers == 1:
        return {"cores": [], "threads": 0, "environment": environment}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // workers)
    own = cores[slot * each : (slot + 1) * each]
    threads = min(each, int(os.environ.get("OMP_NUM_THREADS") or each))
    return {"cores": own, "threads": threads, "environment": environment}


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a recipe, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.whole(path, flushed=False) as file:
        file.write(yaml.safe_dump(values, sort_keys=False).encode())


def checkpoint_of(folder: Path, name: str) -> Path | None:
    """Return a run's best checkpoint, or its newest."""
    best = folder / "checkpoints" / name / "best.ckpt"
    return best if best.exists() else next(iter(checkpoint.newest_first(best.parent)), None)
