"""The numbers of `lm gradients --values`: a corner of each tensor and of its gradient, its largest element, its norm.

Shapes: B examples, V vocabulary.
"""

from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn

from lm.backprop import Gradients, atomic, loss_and_gradients
from lm.errors import UserError

CORNER = 4  # rows and columns shown
Pairs = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def of_parameters(net: nn.Module, tokens: Tensor, targets: Tensor) -> Pairs:
    """Return each parameter with its gradient by hand."""
    for parameter in net.parameters():
        parameter.grad = None
    loss_and_gradients(net, Gradients(), tokens, targets)
    zeros = torch.zeros_like
    return {name: (p.detach(), zeros(p) if p.grad is None else p.grad) for name, p in net.named_parameters()}


@torch.no_grad()
def of_atoms(net: nn.Module, tokens: Tensor, targets: Tensor) -> Pairs:
    """Return each tensor of the lecture with its gradient by hand."""
    values = atomic.forward(net, tokens, targets)
    return {name: (values[name].detach(), gradient) for name, gradient in atomic.backward(values).items()}


def chosen(pairs: Pairs, name: str | None) -> Pairs:
    """Return one tensor alone, named with or without the gradient's d in front.

    Raises:
        UserError: There is none of that name.
    """
    if name is None:
        return pairs
    found = name if name in pairs else name.removeprefix("d")
    if found not in pairs:
        raise UserError(f"--tensor {name[:60]}: there is none of that name: say one of {', '.join(pairs)}")
    return {found: pairs[found]}


def described(pairs: Pairs) -> list[dict[str, Any]]:
    """Return the numbers as plain values."""
    return [
        {
            "name": name,
            "shape": list(value.shape),
            **_numbers("", value),
            **_numbers("gradient_", gradient),
        }
        for name, (value, gradient) in pairs.items()
    ]


def _numbers(prefix: str, one: Tensor) -> dict[str, Any]:
    return {
        f"{prefix}largest": float(one.abs().max()),
        f"{prefix}norm": float(one.norm()),
        f"{prefix}corner": _corner(one).tolist(),
    }


def _corner(one: Tensor) -> Tensor:
    """Return the first rows and columns of a tensor as a matrix."""
    rows = one.flatten(0, -2) if one.ndim > 1 else one.reshape(1, -1)
    return rows[:CORNER, :CORNER]


def show(pairs: Mapping[str, tuple[Tensor, Tensor]], targets: Tensor, stream: IO[str]) -> None:
    """Print the numbers of each tensor; of the logits, a row of the gradient as the lecture looks at it."""
    for name, (value, gradient) in pairs.items():
        print(f"\n{name} {tuple(value.shape)}", file=stream)
        for label, one in (("value", value), ("gradient", gradient)):
            print(f"  {label:<8}  largest {float(one.abs().max()):.3e}  norm {float(one.norm()):.3e}", file=stream)
            for row in _corner(one).tolist():
                print("    " + "  ".join(f"{number:11.4e}" for number in row), file=stream)
        if name == "logits":
            _show_row(value, gradient, targets, stream)


def _show_row(logits: Tensor, gradient: Tensor, targets: Tensor, stream: IO[str]) -> None:
    probabilities, row, target = logits[0].softmax(0), gradient[0] * len(logits), int(targets[0])
    print(
        f"  row 0 of the gradient, times {len(logits)}, beside the probabilities; the target is {target}", file=stream
    )
    for i, (p, d) in enumerate(zip(probabilities.tolist(), row.tolist(), strict=True)):
        print(f"    {i:>3}  {p:8.4f}  {d:8.4f}{'  the probability - 1' * (i == target)}", file=stream)
    print(f"  the row sums to {float(row.sum()):.1e}", file=stream)
