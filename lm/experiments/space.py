"""What a sweep searches: the settings that vary, their values, and the recipe that a choice of them makes."""

import copy
import difflib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lm.errors import UserError

PLAIN = (bool, int, float, str, type(None))
MOST = 10_000  # combinations that are counted, and tried


@dataclass(frozen=True)
class Setting:
    """A setting that varies: by choices, or in a range.

    Args:
        name: Its full name in a recipe, such as model.init_args.optimizer.init_args.lr.
        choices: Its values; empty for a range.
        low: The range's least value.
        high: The range's greatest value.
        log: Whether values are drawn evenly by their logarithm.
        step: The distance of values.
        when: Other settings' values with which alone it varies.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    when: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, found: Any) -> "Setting":
        """Return a setting as a sweep's YAML has it: a list of choices, or a mapping.

        Raises:
            UserError: It is neither, or has fewer than two values.
        """
        if isinstance(found, list):
            found = {"choices": found}
        if not isinstance(found, dict):
            raise UserError(f"settings.{name}: found {str(found)[:60]}, expected a list of choices or low and high")
        check_names(f"settings.{name}", found, ("choices", "low", "high", "log", "step", "when"))
        when = found.get("when", {})
        if not isinstance(when, dict):
            raise UserError(f"settings.{name}.when: found {str(when)[:60]}, expected a mapping: OTHER_SETTING: VALUE")
        if "choices" in found:
            return cls(name, _choices(name, found), when=when)
        return cls(name, when=when, **_range(name, found))

    @property
    def whole(self) -> bool:
        """Whether its range is one of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step or 1, int)

    @property
    def labels(self) -> tuple[Any, ...]:
        """Its choices as Optuna stores them: what is no plain value as JSON."""
        return tuple(choice if isinstance(choice, PLAIN) else json.dumps(choice) for choice in self.choices)

    def value(self, label: Any) -> Any:
        """Return the value that a label stands for."""
        return self.choices[self.labels.index(label)] if self.choices else label

    def ends(self) -> list[Any]:
        """Return its choices, or the ends of its range."""
        return list(self.choices) or [self.low, self.high]

    def finite(self) -> list[Any] | None:
        """Return the labels of all its values; None of a range of real numbers."""
        if self.choices:
            return list(self.labels)
        if not self.whole or self.high - self.low > MOST:
            return None
        return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))


def _choices(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
    choices = found["choices"]
    if not isinstance(choices, list) or {"low", "high", "log", "step"} & found.keys():
        raise UserError(f"settings.{name}.choices: found {str(choices)[:60]}, expected a list, and no range beside it")
    different = {json.dumps(choice, sort_keys=True) for choice in choices}
    if len(different) < len(choices):
        raise UserError(f"settings.{name}.choices: one of {str(choices)[:80]} is there twice: drop it")
    if len(choices) < 2:
        raise UserError(f"settings.{name}: {str(choices)[:60]} leaves no choice: say it in the recipe instead")
    return tuple(choices)


def _range(name: str, found: dict[str, Any]) -> dict[str, Any]:
    place = f"settings.{name}"
    for key in ("low", "high"):
        if key not in found:
            raise UserError(f"{place}: it has no {key}: say low and high, or a list of choices")
    for key in ("low", "high", "step"):
        value = found.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{place}.{key}: found {str(value)[:60]}, expected a number (in YAML 1.0e-4, not 1e-4)")
    low, high, log, step = found["low"], found["high"], found.get("log", False), found.get("step")
    if not isinstance(log, bool):
        raise UserError(f"{place}.log: found {str(log)[:60]}, expected true or false")
    if low == high:
        raise UserError(f"{place}: a range of one value, {low}: say it in the recipe instead")
    if low > high:
        raise UserError(f"{place}: low {low} is above high {high}: swap them")
    if log and low <= 0:
        raise UserError(f"{place}: low is {low}, and log needs it above 0")
    if step is not None and (log or step <= 0 or step > high - low):
        raise UserError(f"{place}.step is {step}: it must be above 0 and at most {high - low}, and without log")
    return {"low": low, "high": high, "log": log, "step": step}


def check_names(place: str, found: Any, known: tuple[str, ...]) -> None:
    """Raise a UserError for a key that is not known, with the nearest that is."""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"{place}{'.' if place else ''}{name}: {hint}")


def check_order(names: Iterable[tuple[str, str]]) -> None:
    """Raise a UserError for a setting that would undo one that is applied before it.

    Args:
        names: Of each setting its place in the sweep's file, such as "fixed", and its name there, in their order.
    """
    before: list[tuple[str, list[str]]] = []
    for place, name in names:
        parts = [part for part in name.split(".") if part != "init_args"]
        if not all(parts):
            raise UserError(f"{place}.{name}: a name has parts with a dot between them, such as model.optimizer.lr")
        for other, own in before:
            if own[: len(parts)] == parts:
                mend = "say it in one place" if own == parts else "leave one out, or put the larger one first"
                raise UserError(f"{place}.{name} undoes {other}: {mend}")
        before.append((f"{place}.{name}", parts))


def check_conditions(settings: tuple[Setting, ...]) -> None:
    """Raise a UserError for a condition on what does not vary above it, or on a value that is no choice."""
    known: dict[str, Setting] = {}
    for setting in settings:
        for other, value in setting.when.items():
            place = f"settings.{setting.name}.when"
            if other not in known:
                check_names(place, [other], tuple(known) or ("a setting that stands above it",))
            if known[other].choices and value not in known[other].choices:
                raise UserError(f"{place}: {other} is never {value}: choose from {list(known[other].choices)}")
        known[setting.name] = setting


def active(setting: Setting, chosen: dict[str, Any], known: dict[str, Setting]) -> bool:
    """Return whether a setting varies, given the labels that are chosen for those above it."""
    return all(other in chosen and known[other].value(chosen[other]) == value for other, value in setting.when.items())


def combinations(settings: tuple[Setting, ...]) -> Iterator[dict[str, Any]]:
    """Yield all combinations of labels, each once; none where a setting has infinitely many values."""
    finite = [setting.finite() for setting in settings]
    if any(values is None for values in finite):
        return
    known = {setting.name: setting for setting in settings}
    seen = set()
    for labels in itertools.product(*(values or [] for values in finite)):
        chosen: dict[str, Any] = {}
        for setting, label in zip(settings, labels, strict=True):
            if active(setting, chosen, known):
                chosen[setting.name] = label
        if (mark := repr(chosen)) not in seen:
            seen.add(mark)
            yield chosen


def corners(settings: tuple[Setting, ...]) -> list[dict[str, Any]]:
    """Return choices that have, between them, every choice and both ends of every range, under a condition, too."""
    known = {setting.name: setting for setting in settings}
    first = {name: setting.ends()[0] for name, setting in known.items()}

    def conditions(name: str) -> dict[str, Any]:
        needed: dict[str, Any] = {}
        for other, value in known[name].when.items():
            needed |= conditions(other) | {other: value}
        return needed

    made = []
    for name, setting in known.items():
        for end in setting.ends():
            values = first | conditions(name) | {name: end}
            chosen: dict[str, Any] = {}
            for one in settings:
                if all(other in chosen and chosen[other] == value for other, value in one.when.items()):
                    chosen[one.name] = values[one.name]
            made.append(chosen)
    return made


def recipe_with(recipe: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with settings changed; `init_args` may be left out of their names."""
    made = copy.deepcopy(recipe)
    for name, value in chosen.items():
        place, parts = made, name.split(".")
        for i, part in enumerate(parts):
            if "class_path" in place and part not in ("class_path", "init_args"):
                place = place.setdefault("init_args", {})
            if i == len(parts) - 1:
                place[part] = copy.deepcopy(value)
            elif not isinstance(place.get(part), dict):
                place[part] = {"class_path": place[part]} if isinstance(place.get(part), str) else {}
            place = place[part]
    return made


def short_names(names: list[str]) -> dict[str, str]:
    """Return each setting's shortest name that no other one has: lr of model.init_args.optimizer.init_args.lr."""
    parts = {name: [part for part in name.split(".") if part != "init_args"] for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for other in names if other != name]
        length = next(
            n for n in range(1, len(own) + 1) if n == len(own) or all(parts[o][-n:] != own[-n:] for o in others)
        )
        found[name] = ".".join(own[-length:])
    return found
