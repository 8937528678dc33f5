"""Runs a student's file, in a process of its own: `python -m lm.course.student FILE EXERCISE SEEDS BLANK…`.

Each blank's answer is a line of JSON on what standard output was at the start; prints of the file go to standard error.
What computes gradients by itself is out of reach while the file's functions run.
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lm.course import EXERCISES

NOT_BY_HAND = "it calls autograd: derive the gradient, and write it as tensor code"
NOT_YOURS = "it calls the product's own rules: derive the gradient, and write it as tensor code"


class CallsAutogradError(Exception):
    """Something computed a gradient by itself."""


@contextmanager
def by_hand() -> Iterator[None]:
    """Put autograd, and what is made of it, out of reach; new tensors are float64."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise CallsAutogradError

    places: list[tuple[Any, str]] = [(torch.autograd, name) for name in ("grad", "backward")]
    places += [(Tensor, "backward"), (Tensor, "requires_grad_"), (torch.autograd.forward_ad, "make_dual")]
    places += [(torch.func, name) for name in ("grad", "grad_and_value", "vjp", "jvp", "jacrev", "jacfwd", "linearize")]
    places += [(torch.autograd.functional, name) for name in ("vjp", "jvp", "jacobian", "hessian", "vhp", "hvp")]
    places += [(torch.autograd.graph, "_engine_run_backward"), (torch.autograd, "_engine_run_backward")]
    before = [(place, name, getattr(place, name)) for place, name in places]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of torch.zeros and the like, as the values are
    for place, name in places:
        setattr(place, name, refuse)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        for place, name, value in before:
            setattr(place, name, value)


FORBIDDEN = re.compile(r"autograd|.*backward.*|requires_grad_?|enable_grad|vjp|jvp|jacrev|jacfwd")


def not_by_hand(source: str) -> dict[str, str]:
    """Return, for each function of a file that names autograd or uses the product's rules, what to say of it."""
    tree = ast.parse(source)
    rules = {name for node in tree.body for name in _from_lm(node)}
    found = {}
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and FORBIDDEN.fullmatch(node.attr):
                found[function.name] = NOT_BY_HAND
            elif _from_lm(node) or (isinstance(node, ast.Name) and node.id in rules):
                found[function.name] = NOT_YOURS
    return found


def _from_lm(node: ast.AST) -> set[str]:
    """Return the names that a statement imports from lm."""
    if isinstance(node, ast.Import):
        return {alias.asname or "lm" for alias in node.names if alias.name.split(".")[0] == "lm"}
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lm":
        return {alias.asname or alias.name for alias in node.names}
    return set()


def answer(function: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a student's function gives, or what is wrong with calling it."""
    wanted = list(inspect.signature(function).parameters)
    unknown = [name for name in wanted if name not in values]
    if unknown:
        there = ", ".join(name for name in values if not name.startswith("_"))
        return {"error": f"there is no value named {unknown[0]}: there are {there}"}
    own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    try:
        with by_hand():
            found = function(**{name: own[name] for name in wanted})
    except CallsAutogradError:
        return {"error": NOT_BY_HAND}
    except Exception as error:
        return {"error": where(error)}
    if isinstance(found, tuple | list) and all(isinstance(one, Tensor) for one in found):
        return {"values": [packed(one) for one in found]}
    if found is None or found is Ellipsis:
        return {"blank": True}
    if isinstance(found, int | float):
        found = torch.tensor(found, dtype=torch.float64)
    if not isinstance(found, Tensor):
        return {"error": f"it returns a {type(found).__name__}: it must return a tensor"}
    return {"values": [packed(found)], "single": True}


def packed(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as JSON; every float64 is written so that it is read back to the last bit."""
    whole = tensor.detach().resolve_conj().to(torch.float64)
    return {"shape": list(whole.shape), "numbers": whole.flatten().tolist()}


def where(error: BaseException) -> str:
    """Return an error in one line, with the line of the student's file."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(sys.prefix)]
    frames = [one for one in frames if "/lm/course/" not in one.filename]
    line = f"line {frames[-1].lineno}: {frames[-1].line}: " if frames else ""
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{line}{type(error).__name__}: {text}"


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
    os.dup2(2, 1)

    def tell(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    exercise = EXERCISES[name]
    tell(begun="")
    try:
        module = load(Path(path))
        suspicious = not_by_hand(Path(path).read_text())
    except BaseException as error:
        tell(failed=where(error))
        return
    values = [exercise.values(int(seed)) for seed in seeds.split(",")]
    for blank in blanks:
        tell(begun=blank)
        function = getattr(module, blank, None)
        if not callable(function):
            found = [{"error": f"the function {blank} is not there: write def {blank}(…)"}]
        elif str(getattr(function, "__module__", "")).startswith("lm."):
            found = [{"error": NOT_YOURS}]
        elif blank in suspicious:
            found = [{"error": suspicious[blank]}]
        else:
            found = [answer(function, one) for one in values]
        tell(name=blank, answers=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
