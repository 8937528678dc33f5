"""Runs a student's file, in a process of its own: `python -m lm.course.student FILE EXERCISE SEEDS BLANK…`.

Each blank's answer is a line of JSON on what standard output was at the start; prints of the file go to standard error.
While the file's functions run, what they call is looked at, as profilers do: autograd and our own rules are refused.
"""

import copy
import importlib.util
import inspect
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad_mode

import lm
from lm.course import EXERCISES

NOT_BY_HAND = "it calls autograd: derive the gradient, and write it as tensor code"
NOT_YOURS = "it calls the product's own rules: derive the gradient, and write it as tensor code"
OURS = str(Path(lm.__file__).parent)
LARGEST = 1_000_000  # elements of an answer: the largest right one has 2,700


class RefusedError(Exception):
    """Something was called that a derivation must do without."""


@contextmanager
def by_hand() -> Iterator[list[str]]:
    """Refuse autograd and the product's rules, however they are reached; yield what was refused.

    New tensors are float64, as the values are.
    """
    refused: list[str] = []

    def look(frame: FrameType, event: str, called: Any) -> None:
        if said := _refusal(frame, event, called):
            refused.append(said)
            raise RefusedError

    dtype, profile = torch.get_default_dtype(), sys.getprofile()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            threading.setprofile(look)
            sys.setprofile(look)
            try:
                yield refused
            finally:
                sys.setprofile(profile)
                threading.setprofile(None)
    finally:
        torch.set_default_dtype(dtype)


def _refusal(frame: FrameType, event: str, called: Any) -> str | None:
    """Return what to say of a call, where it is one that computes a gradient by itself, or records what that needs."""
    if event == "c_call":  # the engine's run_backward, and torch.ops.aten.tanh_backward
        return NOT_BY_HAND if "backward" in called.__name__ else None
    file, name = frame.f_code.co_filename, frame.f_code.co_qualname
    if event != "call" or file == __file__:
        return None
    if file.startswith(OURS):
        return NOT_YOURS
    recorded = name == "make_dual"
    if file == grad_mode.__file__:  # no_grad is harmless
        recorded = name.startswith("enable_grad") or frame.f_locals.get("mode") is name.startswith("set_grad_enabled")
    return NOT_BY_HAND if recorded else None


def answer(function: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a student's function gives, or what is wrong with calling it."""
    refused: list[str] = []
    try:
        wanted = list(inspect.signature(function).parameters)
        if unknown := [name for name in wanted if name not in values]:
            there = ", ".join(name for name in values if not name.startswith("_"))
            return {"error": f"there is no value named {unknown[0]}: there are {there}"}
        given = copy.deepcopy({name: values[name] for name in wanted})  # it may change them
        with by_hand() as refused:
            found = function(**given)
        told = as_json(found)
    except (Exception, SystemExit) as error:
        told = {"error": where(error)}
    return {"error": refused[0]} if refused else told


def as_json(found: Any) -> dict[str, Any]:
    """Return what a function has given, as JSON."""
    if found is None or found is Ellipsis:
        return {"blank": True}
    if isinstance(found, int | float):
        found = torch.tensor(found, dtype=torch.float64)
    several = found if isinstance(found, tuple | list) else [found]
    for one in several:
        if not isinstance(one, Tensor):
            return {"error": f"it returns a {type(one).__name__}: it must return a tensor"}
        if one.numel() > LARGEST:
            return {"error": f"it returns a tensor of shape {tuple(one.shape)}: it must have the shape of its tensor"}
    return {"values": [packed(one) for one in several]}


def packed(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as JSON; every float64 is written so that it is read back to the last bit."""
    whole = tensor.detach().to_dense().resolve_conj().to(torch.float64)
    return {"shape": list(whole.shape), "digits": str(tensor.dtype), "numbers": whole.flatten().tolist()}


def where(error: BaseException) -> str:
    """Return an error in one line, with the line of the student's file."""
    others = (sys.prefix, sys.base_prefix, OURS, "<frozen")
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(others)]
    line = f"line {frames[-1].lineno}: {frames[-1].line}: " if frames else ""
    text = f": {str(error).splitlines()[0]}" if str(error) else ""
    return f"{line}{type(error).__name__}{text}"


def load(path: Path) -> Any:
    """Return a student's file as a module."""
    loader = SourceFileLoader("workbook", str(path))
    spec = importlib.util.spec_from_loader("workbook", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main(path: str, name: str, seeds: str, *blanks: str) -> None:
    """Answer for each blank, a line of JSON each, after a line that says that it is begun."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the file prints

    def tell(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    exercise = EXERCISES[name]
    tell(begun="")
    try:
        module = load(Path(path))
    except BaseException as error:
        tell(failed=where(error))
        return
    values = [exercise.values(int(seed)) for seed in seeds.split(",")]
    for blank in blanks:
        tell(begun=blank)
        function = getattr(module, blank, None)
        if not callable(function):
            found = [{"error": f"the function {blank} is not there: write def {blank}(…)"}]
        else:
            found = [answer(function, one) for one in values]
        tell(name=blank, answers=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
