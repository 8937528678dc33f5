"""What a report says of a sweep: trials, history, what each setting does and how much it matters."""

from pathlib import Path
from typing import Any

from lm.experiments import drawings
from lm.experiments.page import table
from lm.experiments.space import short_names

SIDE_BY_SIDE = 4  # texts below an axis
MOST = 20  # trials whose curves are drawn: the best


def holds(said: str) -> Path | None:
    """Return the folder of a sweep; None where there is none."""
    return next((place for place in (Path(said), Path("sweeps") / said) if (place / "journal.log").is_file()), None)


class SweepReport:
    """A sweep, as its journal has it.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        from lm.experiments.study import open_storage

        self.folder = folder
        storage = open_storage(None, folder, mend=False)
        studies = storage.get_all_studies()
        self.trials: list[Any] = storage.get_all_trials(studies[0]._study_id, deepcopy=False) if studies else []
        self.study: Any = None
        self.maximise, self.metric = False, "val_loss"
        if studies:
            import optuna

            self.study = optuna.load_study(study_name=studies[0].study_name, storage=storage)
            said = self.study.user_attrs.get("lm", {})
            self.maximise = "maximise" in said
            self.metric = said.get("maximise") or said.get("minimise") or "val_loss"
        self.names = short_names(list(dict.fromkeys(name for trial in self.trials for name in trial.params)))
        self.done: list[Any] = [trial for trial in self.trials if trial.state.name == "COMPLETE"]

    @property
    def better(self) -> int:
        """1 where less is better, -1 where more is."""
        return -1 if self.maximise else 1

    def runs(self) -> list[str]:
        """Return the logs of the best trials' runs, or of all where none is complete."""
        ranked = sorted(self.done, key=lambda trial: self.better * trial.value) or self.trials
        found = []
        for trial in ranked[:MOST]:
            places = [self.folder / "logs" / f"trial-{trial.number:04d}{end}" for end in ("", "-seed-0")]
            found += [str(place) for place in places if place.is_dir()]
        return found

    def sections(self, notes: list[str]) -> list[str]:
        """Return the sweep as HTML; what is not to be had is noted."""
        parts = [f"<h2>Sweep {self.folder.name}: {len(self.trials)} trials</h2>"]
        if len(self.done) > 1:
            parts += [self._history(), *self._importance(notes), self._parallel(), *self._slices()]
        return [*parts, self.table()]

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the head and the rows of the table of trials."""
        head = ["trial", "state", self.metric, *self.names.values(), "steps", "seconds", "why"]
        rows = []
        for one in self.trials:
            attrs = one.user_attrs
            value = one.value if one.value is not None else attrs.get("metrics", {}).get(self.metric)
            settings = [one.params.get(name) for name in self.names]
            state = {"COMPLETE": "complete", "PRUNED": "given up", "FAIL": "failed", "RUNNING": "not finished"}
            ends = [attrs.get("steps"), attrs.get("seconds"), attrs.get("reason", "")]
            rows.append([one.number, state.get(one.state.name, one.state.name), value, *settings, *ends])
        return head, rows

    def table(self) -> str:
        """Return the trials as a table."""
        return table(*self.rows())

    def _history(self) -> str:
        best, line = None, []
        for trial in self.done:
            best = trial.value if best is None else (max if self.maximise else min)(best, trial.value)
            line.append((trial.number, best))
        points = [(trial.number, trial.value, f"trial {trial.number}: {trial.value:.5g}") for trial in self.done]
        return drawings.scatter(f"History: {self.metric} of each trial, and the best so far", points, line=line)

    def _importance(self, notes: list[str]) -> list[str]:
        import optuna

        try:
            found = optuna.importance.get_param_importances(
                self.study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
        except Exception as error:  # too few trials, or settings that not all of them have
            notes.append(f"importance of settings: {' '.join(str(error).split())[:160]}")
            return []
        total = sum(found.values()) or 1.0
        shares = {self.names[name]: value / total for name, value in found.items()}
        return [drawings.bars("Importance: which settings tell the best trials from the others (PED-ANOVA)", shares)]

    def _logs(self) -> set[str]:
        return {
            self.names[name]
            for trial in self.trials
            for name, kind in trial.distributions.items()
            if getattr(kind, "log", False)
        }

    def _parallel(self) -> str:
        rows = [([*(one.params.get(name) for name in self.names), one.value], one.value) for one in self.done]
        names = [*self.names.values(), self.metric]
        return drawings.parallel("All trials, the best in red", names, rows, self._logs(), self.better)

    def _slices(self) -> list[str]:
        found = []
        for name, short in self.names.items():
            there = [trial for trial in self.done if name in trial.params]
            points = [(one.params[name], one.value, f"trial {one.number}: {one.params[name]}") for one in there]
            if len({x for x, *_ in points if isinstance(x, str)}) > SIDE_BY_SIDE:
                found.append(drawings.rows(f"{self.metric} by {short}", [(str(x), y, said) for x, y, said in points]))
            elif points:
                found.append(drawings.scatter(f"{self.metric} by {short}", points, log_x=short in self._logs()))
        return found
