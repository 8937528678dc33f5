"""A sweep's trials in an Optuna storage: what is tried next and what is given up follow from it, seed and number.

So a sweep that is killed and started again chooses what an undisturbed one would have chosen.
"""

import copy
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from lm.errors import UserError, described
from lm.experiments.runs import flattened
from lm.experiments.space import Setting, active, combinations
from lm.experiments.spec import Spec

ATTEMPTS = 8  # to choose what was not tried before


class Lock:
    """A lock that the system releases when its holder is killed; Optuna's own then blocks others for half a minute."""

    def __init__(self, path: Path) -> None:
        self.path, self.descriptor = path, -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let others have it."""
        os.close(self.descriptor)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it for a while."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def open_storage(url: str | None, folder: Path, *, mend: bool = True) -> BaseStorage:
    """Return a storage: the folder's journal, or what an Optuna URL names.

    Args:
        url: The URL; None for the journal.
        folder: The sweep's folder.
        mend: Whether a line that was cut off in the journal is removed; else the folder is left as it is.

    Raises:
        UserError: It cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if url is not None:
            return optuna.storages.get_storage(url)
        journal, lock = folder / "journal.log", Lock(folder / ".journal.lock")
        if mend and journal.exists():
            with lock.held():
                _drop_torn_line(journal)
        return JournalStorage(JournalFileBackend(str(journal), cast(Any, lock)))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from error
    except Exception as error:  # SQLAlchemy's, of a URL; a journal of another program
        raise UserError(f"storage {url or folder / 'journal.log'}: {described(error)}") from error


def _drop_torn_line(journal: Path) -> None:
    """Cut off the line that a process was writing when it was killed, or the disk was full."""
    with journal.open("r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


class Trials:
    """A sweep's trials.

    Args:
        spec: The sweep.
        storage: Where they are.
        name: The sweep's name in it.
        lock: Is held while one process chooses.
        node: This machine's number.

    Raises:
        UserError: The storage has another sweep of that name.
    """

    def __init__(self, spec: Spec, storage: BaseStorage, name: str, lock: Lock, node: int = 0) -> None:
        self.spec, self.storage, self.lock, self.node = spec, storage, lock, node
        direction = "maximize" if spec.maximise else "minimize"
        with lock.held():
            settings: dict[str, Any] = {"study_name": name, "direction": direction, "pruner": self._pruner()}
            if name in [one.study_name for one in storage.get_all_studies()]:
                self.study = optuna.load_study(study_name=name, storage=storage, pruner=self._pruner())
            else:
                self.study = optuna.create_study(storage=storage, **settings)
            self._known = {setting.name: setting for setting in spec.settings}
            there = self.study.user_attrs.get("lm")
            if there != spec.identity and not self.study.trials:
                self.study.set_user_attr("lm", spec.identity)
            elif there != spec.identity:
                self._refuse(there or {})

    def _refuse(self, there: dict[str, Any]) -> None:
        from lm.training import recipes  # imports Lightning, which takes seconds

        one, other = dict(flattened(there)), dict(flattened(self.spec.identity))
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        found = [str(recipes.Difference(name, one.get(name), other.get(name))) for name in names]
        differ = ", ".join(found)[:300] or "the order of its settings"
        raise UserError(f"{self.study.study_name}: its trials are of another sweep ({differ}): say another name")

    def _pruner(self) -> optuna.pruners.BasePruner:
        kinds: dict[str, Any] = {
            "none": optuna.pruners.NopPruner,
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
            "wilcoxon": optuna.pruners.WilcoxonPruner,
        }
        made: optuna.pruners.BasePruner = kinds[self.spec.pruner]()
        return made

    def all(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        found: list[FrozenTrial] = self.storage.get_all_trials(self.study._study_id, deepcopy=False)
        return found

    # -- what is tried next

    def add(self) -> FrozenTrial | None:
        """Choose the next trial and store it as running, in one piece; None where all combinations were tried."""
        with self.lock.held():
            history = self.all()
            chosen = self._choose(history)
            if chosen is None:
                return None
            distributions = {name: distribution(self._known[name]) for name in chosen}
            trial = create_trial(
                state=TrialState.RUNNING,
                params=chosen,
                distributions=distributions,
                user_attrs={"node": self.node},
            )
            made = self.storage.create_new_trial(self.study._study_id, template_trial=trial)
        return self.storage.get_trial(made)

    def _choose(self, history: list[FrozenTrial]) -> dict[str, Any] | None:
        """Return the labels of the next trial, which no earlier one has."""
        tried = {repr(sorted(trial.params.items())) for trial in history}
        for attempt in range(0 if self.spec.sampler == "grid" else ATTEMPTS):
            chosen = self._sample(history, attempt)
            if repr(sorted(chosen.items())) not in tried:
                return chosen
        endless = any(setting.finite() is None for setting in self.spec.settings)
        if endless:
            return chosen
        return next((one for one in combinations(self.spec.settings) if repr(sorted(one.items())) not in tried), None)

    def _sample(self, history: list[FrozenTrial], attempt: int) -> dict[str, Any]:
        """Return what the sampler suggests: a function of the trials so far, the seed and how many they are."""
        seed = int(np.random.SeedSequence([self.spec.seed, len(history), attempt]).generate_state(1)[0])
        kinds: dict[str, Any] = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        kind = kinds.get(self.spec.sampler, optuna.samplers.RandomSampler)
        sampler = (kind if attempt < ATTEMPTS // 2 else optuna.samplers.RandomSampler)(seed=seed)
        memory = optuna.create_study(
            study_name=self.study.study_name, direction=self.study.direction, sampler=sampler, pruner=self._pruner()
        )
        memory.add_trials(history)
        trial = memory.ask()
        chosen: dict[str, Any] = {}
        for setting in self.spec.settings:
            if active(setting, chosen, self._known):
                chosen[setting.name] = trial._suggest(setting.name, distribution(setting))
        return chosen

    # -- what became of a trial

    def report(self, trial: FrozenTrial, step: int, value: float) -> None:
        """Store a trial's value at a step; again after a kill, it is the same."""
        self.storage.set_trial_intermediate_value(trial._trial_id, step, value)

    def note(self, trial: FrozenTrial, **values: Any) -> None:
        """Store what else is known of a trial."""
        for name, value in values.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def newest(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial as it is stored now."""
        return self.storage.get_trial(trial._trial_id)

    def hopeless(self, trial: FrozenTrial, step: int) -> bool:
        """Return whether a trial is to be given up at a step, whatever an earlier process stored of later ones."""
        found = copy.copy(self.newest(trial))  # the storage keeps the one that it gives
        found.intermediate_values = {k: v for k, v in found.intermediate_values.items() if k <= step}
        return bool(self.study.pruner.prune(self.study, found))

    def end(self, trial: FrozenTrial, state: TrialState, value: float | None = None) -> None:
        """Store how a trial ended."""
        values = None if value is None else [value]
        self.storage.set_trial_state_values(trial._trial_id, state, values)

    def best(self) -> FrozenTrial | None:
        """Return the best of the trials that were completed."""
        done = [trial for trial in self.all() if trial.state == TrialState.COMPLETE]
        sign = -1 if self.spec.maximise else 1
        return min(done, key=lambda trial: (sign * float(trial.value or 0), trial.number), default=None)

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return a trial's settings as a recipe has them."""
        return {name: self._known[name].value(label) for name, label in trial.params.items()}


def distribution(setting: Setting) -> Any:
    """Return a setting's values as Optuna has them."""
    if setting.choices:
        return optuna.distributions.CategoricalDistribution(setting.labels)
    if setting.whole:
        step = int(setting.step or 1)
        high = int(setting.high) - (int(setting.high) - int(setting.low)) % step
        return optuna.distributions.IntDistribution(int(setting.low), high, log=setting.log, step=step)
    return optuna.distributions.FloatDistribution(
        float(setting.low), float(setting.high), log=setting.log, step=setting.step
    )
