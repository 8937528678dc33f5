"""A sweep's YAML, checked."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.experiments.space import MOST, Setting, check_conditions, check_names, check_order, recipe_with

SAMPLERS = ("tpe", "random", "grid", "gp")
PRUNERS = ("none", "median", "hyperband", "wilcoxon")
KEYS = (
    "recipe",
    "fixed",
    "variants",
    "settings",
    "minimise",
    "maximise",
    "at",
    "sampler",
    "pruner",
    "trials",
    "seeds",
    "seed",
    "budget",
)
VARIANT = "variant"
"""The setting whose choices are the names of a sweep's variants."""
LONGEST = 60
"""Characters of a variant's name."""
TRAINING = ("loss", "loss_step", "learning_rate", "gradient_norm", "tokens", "tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sweep.

    Args:
        recipe: The recipe, as its file has it, but for what the sweep fixes.
        settings: What varies.
        variants: Of each name, the settings that it changes together.
        metric: What is minimised, or maximised.
        maximise: Whether it is maximised.
        at: Where it is read: "end", "best", a step, or {"minutes": N} of training.
        sampler: How values are chosen.
        pruner: When a trial is given up.
        trials: How many trials.
        seeds: How many runs a trial is the mean of.
        seed: Of the choices.
        steps: After how many steps of all trials no more begins.
        minutes: After how many minutes of all trials no more begins.
    """

    recipe: dict[str, Any]
    settings: tuple[Setting, ...]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    metric: str = "val_loss"
    maximise: bool = False
    at: str | int | dict[str, float] = "end"
    sampler: str = "tpe"
    pruner: str = "none"
    trials: int = 20
    seeds: int = 1
    seed: int = 1337
    steps: int | None = None
    minutes: float | None = None
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same where a sweep goes on; how long it goes on may differ."""
        kept = {key: value for key, value in self.said.items() if key not in ("trials", "budget", "recipe", "fixed")}
        if self.variants:  # as texts, so that one that changes nothing is named where sweeps differ
            kept["variants"] = {name: str(changed) for name, changed in self.variants.items()}
        return {**kept, "recipe": self.recipe}

    def recipe_of(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe that a choice of values makes."""
        variant = self.variants.get(chosen.get(VARIANT, ""), {})
        return recipe_with(self.recipe, variant | {name: value for name, value in chosen.items() if name != VARIANT})


def parse(found: Any, recipe: Any) -> Spec:
    """Return a sweep.

    Args:
        found: Its YAML.
        recipe: That of the recipe that it names.

    Raises:
        UserError: Something is unknown, missing, or of another kind.
    """
    check_names("", found, KEYS)
    variants = _variants(found)
    said = found.get("settings") or {}
    if not isinstance(said, dict) or not (said or variants):
        raise UserError("settings: nothing varies: name settings of the recipe, each with its choices or range")
    settings = tuple(Setting.of(str(name), value) for name, value in said.items())
    if VARIANT in said:
        raise UserError(f"settings.{VARIANT}: no recipe has it: name what is compared under variants")
    if variants:
        settings = (Setting(VARIANT, tuple(variants)), *settings)
    check_conditions(settings)
    if not isinstance(recipe, dict):
        raise UserError("recipe: it is no recipe: name a YAML file as lm fit takes it")
    fixed = _fixed(found)
    check_order(("settings", setting.name) for setting in settings if not setting.when)
    for place, own in {"fixed": fixed, **{f"variants.{name}": changed for name, changed in variants.items()}}.items():
        for last in [[], *([("settings", str(name))] for name in said)]:
            check_order([*((place, name) for name in own), *last])
    recipe = recipe_with(recipe, fixed)
    metric, maximise = _metric(found, recipe)
    budget = found.get("budget", {})
    if not isinstance(budget, dict):
        raise UserError(f"budget: found {str(budget)[:60]}, expected steps: N or minutes: X")
    check_names("budget", budget, ("steps", "minutes"))
    sampler = _one_of("sampler", found.get("sampler", "grid" if variants else "tpe"), SAMPLERS)
    spec = Spec(
        recipe=recipe,
        settings=settings,
        variants=variants,
        metric=metric,
        maximise=maximise,
        at=_at(found.get("at", "end")),
        sampler=sampler,
        pruner=_one_of("pruner", found.get("pruner", "none"), PRUNERS),
        trials=_number("trials", found.get("trials", MOST if sampler == "grid" else 20)),
        seeds=_number("seeds", found.get("seeds", 1)),
        seed=_number("seed", found.get("seed", 1337), least=0),
        steps=_number("budget.steps", budget["steps"]) if "steps" in budget else None,
        minutes=_number("budget.minutes", budget["minutes"], whole=False) if "minutes" in budget else None,
        said=found,
    )
    if spec.pruner == "wilcoxon" and spec.seeds < 2:
        raise UserError("pruner wilcoxon compares runs of several seeds: say seeds, 3 or more")
    if spec.sampler == "grid" and any(setting.finite() is None for setting in settings):
        endless = next(setting.name for setting in settings if setting.finite() is None)
        raise UserError(f"sampler grid: settings.{endless} has no end of values: say choices, or another sampler")
    return spec


def _fixed(found: dict[str, Any]) -> dict[str, Any]:
    """Return the values that all trials have in place of the recipe's, by their settings' names."""
    fixed = found.get("fixed", {})
    if not isinstance(fixed, dict):
        raise UserError(f"fixed: found {str(fixed)[:60]}, expected settings of the recipe, each with its value")
    return {str(name): value for name, value in fixed.items()}


def _variants(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each of the named variants changes."""
    variants = found.get("variants", {})
    if not isinstance(variants, dict):
        raise UserError(f"variants: found {str(variants)[:60]}, expected a mapping: NAME: {{SETTING: VALUE}}")
    if len(variants) == 1:
        raise UserError("variants: there is one: say its settings as fixed, or a second one")
    names: dict[str, str] = {}
    for name, changed in variants.items():
        if not str(name).isprintable() or not str(name).strip() or len(str(name)) > LONGEST:
            raise UserError(f"variants.{str(name)[:40]!r}: say a name of 1 to {LONGEST} characters that can be printed")
        if not isinstance(changed, dict):
            raise UserError(f"variants.{name}: found {str(changed)[:60]}, expected settings of the recipe, or {{}}")
        if (other := names.setdefault(json.dumps(changed, sort_keys=True, default=str), str(name))) != str(name):
            raise UserError(f"variants.{name}: it is the same as {other}: drop one")
    if len({*map(str, variants)}) < len(variants):
        raise UserError("variants: two have one name: call them otherwise")
    return {str(name): {str(key): value for key, value in changed.items()} for name, changed in variants.items()}


def _metric(found: dict[str, Any], recipe: dict[str, Any]) -> tuple[str, bool]:
    if "minimise" in found and "maximise" in found:
        raise UserError("minimise and maximise: say one of them")
    maximise = "maximise" in found
    metric = found.get("maximise" if maximise else "minimise", "val_loss")
    own = (recipe.get("trainer") or {}).get("callbacks")  # those may log anything
    if metric == "val_loss" or (isinstance(metric, str) and (own or metric.startswith("train/learning_rate_"))):
        return metric, maximise
    from lm.training.metrics import SHOWN  # imports torch, which takes a second

    known = ("val_loss", "val/loss", *(f"val/{name}" for name in SHOWN), *(f"train/{name}" for name in TRAINING))
    if metric not in known:
        check_names("maximise" if maximise else "minimise", [str(metric)[:80]], known)
    return str(metric), maximise


def _at(found: Any) -> Any:
    if isinstance(found, dict):
        check_names("at", found, ("minutes",))
        return {"minutes": _number("at.minutes", found.get("minutes"), whole=False)}
    if found in ("end", "best"):
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        return _number("at", found)
    raise UserError(f"at: found {str(found)[:60]}, expected end, best, a step, or minutes: X")


def _one_of(name: str, found: Any, known: tuple[str, ...]) -> str:
    if found not in known:
        check_names(name, [str(found)[:60]], known)
    return str(found)


def _number(name: str, found: Any, *, least: int = 1, whole: bool = True) -> Any:
    good = isinstance(found, int if whole else int | float) and not isinstance(found, bool)
    if not good or not (found >= least if whole else found > 0) or found > 2**53:
        kind = f"a whole number, at least {least}" if whole else "a number above 0"
        raise UserError(f"{name} is {str(found)[:60]}: it must be {kind}")
    return found


def read(path: Path, parse_yaml: Any) -> Spec:
    """Return the sweep of a file.

    Args:
        path: The file.
        parse_yaml: Returns the values of a YAML text.

    Raises:
        UserError: It, or its recipe, cannot be read.
    """
    found = _values(path, parse_yaml)
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), str):
        raise UserError(f"{path}: it names no recipe: say recipe: FILE")
    file = Path(found["recipe"])
    beside = path.parent / file
    if not file.exists() and not beside.exists():
        raise UserError(f"{path}: recipe {file}: there is no such file, neither here nor beside it")
    return parse(found, _values(file if file.exists() else beside, parse_yaml))


def _values(path: Path, parse_yaml: Any) -> Any:
    try:
        return parse_yaml(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # a YAML error of whichever parser
        raise UserError(f"{path}: it is no YAML: {' '.join(str(error).split())[:200]}") from error
