"""What an exercise is: a forward pass in steps, and a blank for the gradient by each tensor.

A gradient is checked alone. It is given random gradients of the steps that read its tensor, as if they came from
above, so an error elsewhere does not reach it, and zero is never right by chance.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lm.backprop.atomic import called

Values = dict[str, Any]
Step = Callable[..., Any]
Terms = dict[str, tuple[Tensor, dict[str, Tensor]]]


def total(terms: Terms) -> Tensor:
    """Return the sum of some terms."""
    first, *rest = [term for term, _ in terms.values()]
    for term in rest:
        first = first + term
    return first


def norm_terms(r: Tensor, hat: Tensor, g: Tensor, axis: int, m: int, *, centred: bool) -> Terms:
    """Return the ways from x to the loss through a norm, as they are and with the usual mistakes.

    Args:
        r: One over the deviation.
        hat: x after the norm.
        g: The gradient from above, times the gain.
        axis: That which is normalised.
        m: By what the sum of squares was divided.
        centred: Whether the mean was subtracted.
    """
    n = g.shape[axis]

    def by_r(inner: Tensor, outer: Tensor) -> Tensor:
        return -r * outer * inner.sum(axis, keepdim=True) / m

    other = 1 if axis == 0 else -2
    mistakes = {
        "missing sum: there is no sum": -r * hat * g * hat / m,
        "missing sum: it runs over the wrong axis": -r * hat * (g * hat).sum(other, keepdim=True),
        "factor: x̂ is missing inside the sum": by_r(g, hat),
        "factor: x̂ is missing outside the sum": by_r(g * hat, torch.ones_like(hat)),
        "factor: g is missing inside the sum": by_r(hat, hat),
        "factor: x̂ is twice not divided by the deviation": by_r(g * hat / r, hat / r),
        "factor: x̂ is once not divided by the deviation": by_r(g * hat / r, hat),
    }
    by_mean = (-r * g.sum(axis, keepdim=True) / n, {"missing sum: there is no sum": -r * g / n})
    return {
        "directly, r g": (r * g, {}),
        **({"by the mean, -r Σg / n": by_mean} if centred else {}),
        "by the squares, -r x̂ Σ(g x̂) / m": (by_r(g * hat, hat), mistakes),
    }


@dataclass(frozen=True, kw_only=True)
class Blank:
    """A gradient to be derived.

    Args:
        solution: The product's own rule; its parameters name forward values, and gradients by a d in front. Its name
            is the blank's, its docstring the derivation.
        hints: The first says where to look, the last nearly all.
        terms: Returns the terms that the right answer is a sum of, by what they are; each with what it would be with
            some mistakes, by what to say of those: the kind stands before the colon.
        faults: Wrong answers that are known, by what to say of them; the kind stands before the colon.
        expected: Returns the right answer where it is no gradient by a single tensor.
        rule: The function whose derivation is revealed, where that is not the solution.
        single: Where the answer is several gradients: returns the exercise, the blank and the values of one of them.
    """

    solution: Step
    hints: tuple[str, ...] = ()
    terms: Callable[..., Terms] | None = None
    faults: Mapping[str, Step] = field(default_factory=dict)
    expected: Step | None = None
    rule: Step | None = None
    single: Callable[[Values, int], tuple["Exercise", "Blank", Values]] | None = None

    @property
    def name(self) -> str:
        """Of the function that a student writes."""
        return self.solution.__name__

    @property
    def of(self) -> str:
        """The tensor by which it is the gradient."""
        return self.name[1:]

    @property
    def parameters(self) -> list[str]:
        """What the function is given."""
        return list(inspect.signature(self.solution).parameters)


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """A workbook.

    Args:
        name: Of its file.
        title: Its heading.
        story: What is to be done, and what helps, in Markdown.
        inputs: Makes the values that no step makes.
        steps: Each tensor of the forward pass, of those before it, by the names of its parameters.
        blanks: In the order of the backward pass.
    """

    name: str
    title: str
    story: str
    inputs: Callable[[torch.Generator], Values]
    steps: Mapping[str, Step]
    blanks: tuple[Blank, ...]

    @cached_property
    def by_name(self) -> dict[str, Blank]:
        """The blanks by their names."""
        return {blank.name: blank for blank in self.blanks}

    def values(self, seed: int = 1) -> Values:
        """Return every value of a forward pass in float64, and a random gradient by each step's result."""
        generator = torch.Generator().manual_seed(seed)
        values = self.inputs(generator)
        with torch.no_grad():
            for name, step in self.steps.items():
                values[name] = called(step, values)
        for name in self.steps:
            values[f"d{name}"] = torch.randn(values[name].shape, generator=generator, dtype=torch.float64)
        if "loss" in self.steps:
            values["dloss"] = torch.ones((), dtype=torch.float64)
        return values

    def readers(self, name: str) -> list[str]:
        """Return the steps that read a value."""
        return [one for one, step in self.steps.items() if name in inspect.signature(step).parameters]

    def parts(self, name: str, values: Values) -> dict[str, Tensor]:
        """Return, for each step that reads a tensor, what it adds to the tensor's gradient, by autograd."""
        return {one: self.part(name, one, values[f"d{one}"], values) for one in self.readers(name)}

    def part(self, name: str, reader: str, dy: Tensor, values: Values) -> Tensor:
        """Return what one step adds to a tensor's gradient, for the gradient dy by its result."""
        x = values[name].detach().clone().requires_grad_()
        with torch.enable_grad():
            y = called(self.steps[reader], {**values, name: x})
            found: Tensor = torch.autograd.grad(y, x, dy)[0]
        return found

    def expected(self, blank: Blank, values: Values) -> Any:
        """Return the right answer."""
        if blank.expected is not None:
            return called(blank.expected, values)
        return torch.stack(list(self.parts(blank.of, values).values())).sum(0)

    def slope(self, name: str, direction: Tensor, values: Values) -> float:
        """Return the slope of what follows a tensor, weighted by the gradients from above, by central differences."""
        h, sums = 1e-6, []
        for x in (values[name] + h * direction, values[name] - h * direction):
            with torch.no_grad():
                made = {one: called(self.steps[one], {**values, name: x}) for one in self.readers(name)}
            sums.append(sum(float((values[f"d{one}"] * y).sum()) for one, y in made.items()))
        return (sums[0] - sums[1]) / (2 * h)


def body(function: Step) -> str:
    """Return a function's code without its signature and its docstring; of a lambda, the expression."""
    code: CodeType = function.__code__
    text = Path(code.co_filename).read_text(encoding="utf-8")
    nodes = (one for one in ast.walk(ast.parse(text)) if _first_line(one) == code.co_firstlineno)
    names = list(inspect.signature(function).parameters)
    for node in nodes:
        if isinstance(node, ast.Lambda) and [one.arg for one in node.args.args] == names:
            return ast.unparse(node.body)
        if isinstance(node, ast.FunctionDef):
            first = node.body[1 if ast.get_docstring(node) else 0]
            return textwrap.dedent("\n".join(text.splitlines()[first.lineno - 1 : node.end_lineno]))
    raise LookupError(f"{function.__name__} has no source")


def _first_line(node: Any) -> int:
    lines = [getattr(node, "lineno", 0), *(one.lineno for one in getattr(node, "decorator_list", ()))]
    return int(min(lines))


def reveal(blank: Blank) -> str:
    """Return the derivation and the solution's code, or that of the product's rule which it calls."""
    parts = [inspect.getdoc(blank.solution) or ""]
    if blank.rule is not None:
        parts += [
            f"The product's own, {blank.rule.__module__}.{blank.rule.__name__}:",
            inspect.getdoc(blank.rule) or "",
        ]
    return "\n\n".join([*parts, textwrap.indent(body(blank.rule or blank.solution), "    ")])
