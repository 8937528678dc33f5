"""What a checkpoint must have to be used and to be resumed from, checked before anything fails for lack of it."""

from typing import Any

from torch import Tensor

Outline = Any
"""A type; a dict of required keys and their outlines; or a list of one outline, which all items must match."""

NUMBER = (int, float)
FITTED: Outline = {
    "global_step": int,
    "state_dict": dict,
    "lm": {"tokenizer": {"kind": str}, "vocab_size": int, "block_size": int},
}
"""What a LanguageModel saves, even in a user's own Trainer."""
USED: Outline = FITTED | {
    "lm": FITTED["lm"] | {"config": {"model": {"init_args": {"net": {"class_path": str}}}}},
}
"""What every command needs."""
RESUMED: Outline = USED | {
    "epoch": int,
    "loops": {"fit_loop": dict},
    "callbacks": {"Checkpoints": {"best": NUMBER, "validated_step": int}},
    "random_states": [{"torch": Tensor, "cuda": list, "python": tuple, "numpy": tuple}],
    "lm": USED["lm"] | {"train": dict, "validation": dict},
}
"""What training needs to resume."""


def problem(found: Any, outline: Outline, where: str = "") -> str | None:
    """Return the first key that is missing or of another type, or None where all is there.

    Args:
        found: A checkpoint, or a part of it.
        outline: What it must have.
        where: Which part it is.
    """
    if isinstance(outline, dict):
        if not isinstance(found, dict):
            return f"{where or 'it'} is of type {type(found).__name__}"
        for key, inner in outline.items():
            path = f"{where}.{key}".lstrip(".")
            if key not in found:
                return f"it has no {path}"
            if wrong := problem(found[key], inner, path):
                return wrong
        return None
    if isinstance(outline, list):
        if not isinstance(found, list):
            return f"{where} is of type {type(found).__name__}"
        return next(filter(None, (problem(item, outline[0], where) for item in found)), None)
    return None if isinstance(found, outline) else f"{where} is of type {type(found).__name__}"


def resuming_problem(checkpoint: dict[str, Any]) -> str | None:
    """Return what prevents training from resuming from a checkpoint, or None."""
    return (
        problem(checkpoint, RESUMED)
        or _not_a_number(checkpoint["loops"], "loops")
        or _not_a_number({k: checkpoint["lm"].get(k) for k in ("train", "validation", "guard")}, "lm")
    )


def _not_a_number(found: Any, where: str) -> str | None:
    """Return what is wrong with the first value in nested dicts that is neither a number nor None."""
    if isinstance(found, dict):
        return next(filter(None, (_not_a_number(value, f"{where}.{key}") for key, value in found.items())), None)
    return None if found is None or isinstance(found, NUMBER) else f"{where} is of type {type(found).__name__}"


def not_finite(weights: dict[str, Tensor]) -> str | None:
    """Return the name of the first of a network's weights that has NaN or infinity."""
    return next((name for name, value in weights.items() if not value.isfinite().all()), None)
