"""How two recipes differ: a checkpoint's and the one that resumes from it."""

import inspect
import json
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

NO_MATTER = {"num_workers", "steps_per_call", "compile", "activation_checkpointing", "audit_every"}
"""Settings that say how a step is computed, not what comes out; but see `LanguageModel.calls_matter`."""
OF_TRAINER = (
    "max_steps",
    "min_steps",
    "max_time",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "val_check_interval",
    "limit_val_batches",
)
"""Settings of the Trainer that are about the training, and not about the machine."""
OMITTED = {
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.1}},
    "schedule": {"class_path": "lm.training.schedules.Constant"},
}
"""The defaults where a recipe leaves these out."""
DERIVED = {"attention_bias", "n_kv_head", "hidden_size", "depth"}
"""Settings of lm.models' networks whose null means that others decide; where they differ, so do the weights' shapes."""
PRECISIONS = {None: "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


class Difference(NamedTuple):
    """A setting that differs."""

    name: str
    there: Any
    """In the checkpoint."""
    here: Any
    """In the recipe."""

    def __str__(self) -> str:
        return f"{self.name} {said(self.there)} → {said(self.here)}"


def said(value: Any) -> str:
    """Return a setting's value as a recipe writes it; for a class, its name."""
    if _is_class(value):
        return str(value["class_path"])
    return value if isinstance(value, str) else json.dumps(value, default=str)


def between(there: dict[str, Any], here: dict[str, Any]) -> list[Difference]:
    """Return where a recipe, `here`, trains differently from a checkpoint's; what it writes or shows is ignored."""
    sections = [("", "seed_everything"), ("data", "data"), ("model", "model"), ("trainer", "trainer")]
    pairs = [(name, *(_trained(recipe, section) for recipe in (there, here))) for name, section in sections]
    found = [difference for name, one, other in pairs for difference in differences(one, other, name)]
    kind = pkgutil.resolve_name(here["model"]["class_path"]) if _is_class(here.get("model")) else None
    ignored = NO_MATTER - ({"steps_per_call"} if getattr(kind, "calls_matter", False) else set())
    return [one for one in found if one.name.rpartition(".")[2] not in ignored]


def _trained(recipe: dict[str, Any], section: str) -> Any:
    """Return a section's settings that affect training, with the defaults that no signature shows."""
    settings = recipe.get(section) or {}
    if section == "seed_everything":
        return {section: recipe.get(section)}
    if section == "trainer":
        chosen = {name: settings.get(name) for name in OF_TRAINER}
        precision = chosen["precision"]
        return chosen | {"precision": PRECISIONS.get(precision and str(precision), precision)}
    if section == "model":
        arguments = settings.get("init_args") or {}
        return settings | {"init_args": arguments | {k: arguments.get(k) or usual for k, usual in OMITTED.items()}}
    return settings


def differences(there: Any, here: Any, name: str = "") -> Iterator[Difference]:
    """Yield where two parts of recipes differ.

    A class is compared with its defaults filled in, so that stating a default is no difference; of two different
    classes, the settings that both have are compared. Only the class that `here` names is imported: the checkpoint's
    may be anything.

    Args:
        there: The checkpoint's.
        here: The recipe's.
        name: The part's name, as the result has it; "" for a whole recipe.
    """
    implied: set[str] = set()
    if _is_class(there) and _is_class(here):
        kind = pkgutil.resolve_name(here["class_path"])
        same = there["class_path"] in (here["class_path"], f"{kind.__module__}.{kind.__qualname__}")
        settings = [one.get("init_args") or {} for one in (there, here)]
        if same:
            there, here = (_defaults(kind) | one for one in settings)
            if kind.__module__.startswith("lm.models."):
                implied = {key for key in DERIVED if None in (there.get(key), here.get(key))}
        else:
            yield Difference(name or "class_path", there["class_path"], here["class_path"])
            there, here = ({key: one[key] for key in one if all(key in each for each in settings)} for one in settings)
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [key for key in {**there, **here} if key not in implied]:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield Difference(name, there, here)


def _is_class(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" in value


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a class's arguments, including its bases', or of a function's."""
    makers = [vars(base).get("__init__") for base in reversed(kind.__mro__)] if isinstance(kind, type) else [kind]
    written = [maker for maker in makers if inspect.isfunction(maker)]  # one in C may have no signature
    parameters = [p for maker in written for p in inspect.signature(maker).parameters.values()]
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
