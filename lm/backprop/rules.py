"""How rules are found, and where they put the gradients of parameters.

A rule is a function of a layer: `rule(layer, grads, *inputs)` computes the layer's output and returns it with a
function `backward`, which turns the gradient of the loss by that output into the gradient by the input, and adds the
gradients by the layer's parameters to `grads`. What the backward pass needs of the forward pass is what `backward`
closes over. Composites call `run` on their parts.

Throughout, dy stands for dL/dy, the gradient of the loss by y, of y's shape.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Backward = Callable[..., Any]
Rule = Callable[..., tuple[Any, Backward]]


class NoRuleError(TypeError):
    """A layer has no hand-derived gradient."""


class Gradients:
    """Adds gradients to each parameter's `.grad`, as autograd does.

    Attributes:
        shares: Where it is a dictionary, residual sums put in, for the module of each branch, the share of the
            gradient that flows through the branch.
        dlogits: Where `keep_dlogits` is set, the gradient by the logits, one row a prediction (N, V).
        recomputed: Layers that keep their inputs alone for the backward pass, and compute the rest again there.
    """

    def __init__(self) -> None:
        self.recomputed: Collection[nn.Module] = ()
        self.shares: dict[nn.Module, Tensor] | None = None
        self.keep_dlogits = False
        self.dlogits: Tensor | None = None

    def begin(self, parameters: list[nn.Parameter]) -> None:
        """Begin a step, of one or more passes: nothing is known of the gradients."""
        for parameter in parameters:
            parameter.grad = None

    def last_pass(self) -> None:
        """Say that the pass that follows is the step's last."""

    def finish(self) -> None:
        """End a step: each parameter's gradient is whole."""

    def call(self, rule: Rule, layer: nn.Module, *inputs: Any) -> tuple[Any, Backward]:
        """Return what a layer's rule does."""
        if layer in self.recomputed:
            return again(rule, layer, self, *inputs)
        return rule(layer, self, *inputs)

    def hooks(self, layer: nn.Module) -> Iterable[Callable[..., Any]]:
        """Return what is to be called with a layer, its inputs and its output."""
        return layer._forward_hooks.values()

    def known(self, parameter: Tensor) -> Tensor | None:
        """Return what has been added so far, or None for nothing."""
        return parameter.grad

    def keep(self, parameter: Tensor, gradient: Tensor) -> None:
        """Let a tensor be the place that a parameter's gradients are added to."""
        parameter.grad = gradient

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add a gradient to what is known of a parameter's, in the parameter's shape and type."""
        if not parameter.requires_grad:
            return
        known = self.known(parameter)
        if known is None:
            self.keep(parameter, gradient.to(parameter.dtype))
        else:
            known += gradient

    def add_rows(self, table: Tensor, index: Tensor, rows: Tensor) -> None:
        """Add rows (N, C) to the gradient of a table (V, C) at index (N,), where a row may occur many times."""
        if not table.requires_grad:
            return
        known = self.known(table)
        if known is None:
            known = torch.zeros_like(table)
            self.keep(table, known)
        known.scatter_add_(0, index.unsqueeze(1).expand_as(rows), rows.to(table.dtype))


class Collected(Gradients):
    """Adds in the same way, but into a dictionary: torch.compile prefers results to what is changed in passing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Tensor, Tensor] = {}

    def known(self, parameter: Tensor) -> Tensor | None:
        """Return what has been added so far, or None for nothing."""
        return self.found.get(parameter)

    def keep(self, parameter: Tensor, gradient: Tensor) -> None:
        """Let a tensor be the place that a parameter's gradients are added to."""
        self.found[parameter] = gradient


_rules: dict[type, Rule] = {}


def rule(*kinds: type) -> Callable[[Rule], Rule]:
    """Register a function as the rule of layers of exactly these types; a subclass may compute something else."""

    def register(function: Rule) -> Rule:
        for kind in kinds:
            _rules[kind] = function
        return function

    return register


def registered() -> dict[type, Rule]:
    """Return the rules by the types of their layers."""
    return dict(_rules)


def run(layer: nn.Module, grads: Gradients, *inputs: Any) -> tuple[Any, Backward]:
    """Compute a layer's output by its rule.

    Args:
        layer: Any layer or network of `lm.models`.
        grads: Takes the gradients of its parameters during the backward pass.
        inputs: What its forward method takes.

    Returns:
        The output, and the function from the output's gradient to the input's; of several inputs, a tuple of each
        tensor's gradient in order.

    Raises:
        NoRuleError: The layer's type has none.
    """
    found = _rules.get(kind_of(layer))
    if found is None:
        raise NoRuleError(explanation(kind_of(layer)))
    output, backward = grads.call(found, layer, *inputs)
    for hook in grads.hooks(layer):  # those who look at activations need not know how they came about
        hook(layer, inputs, output)
    return output, backward


def kind_of(layer: nn.Module) -> type:
    """Return a layer's class; of one that FSDP2 has sharded, which makes a subclass of its own, the class before."""
    kind, *before = type(layer).__mro__
    return before[1] if before[0].__name__ == "FSDPModule" else kind


def again(rule: Rule, layer: nn.Module, grads: Gradients, *inputs: Any) -> tuple[Any, Backward]:
    """Run a rule, keep the inputs alone, and run it again in the backward pass, with the same random numbers.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    """
    devices = sorted({x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda})
    before = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    output, _ = rule(layer, grads, *inputs)

    def backward(*dy: Any) -> Any:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(before[0])
            for device, state in zip(devices, before[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            _, backward = rule(layer, grads, *inputs)
        return backward(*dy)

    return output, once(backward)


def explanation(kind: type) -> str:
    """Return what to say of a type of layer without rule."""
    return (
        f"no gradient was derived by hand for a layer {kind.__module__}.{kind.__qualname__}: write a rule for it, "
        "decorated with lm.backprop.rule as those of lm/backprop/linear.py are, or train it with "
        "lm.training.LanguageModel"
    )


def check(net: nn.Module) -> None:
    """Raise NoRuleError where a network has a layer without rule."""
    for module in net.modules():
        if kind_of(module) not in _rules and not isinstance(module, nn.ModuleList):
            raise NoRuleError(explanation(kind_of(module)))


def once(backward: Backward) -> Backward:
    """Return a backward function that lets go of what it kept while it runs, and so refuses to run again."""
    ran: list[bool] = []

    def guarded(*dy: Any) -> Any:
        if ran:
            raise RuntimeError("this backward pass has run and let go of what it kept: run the forward pass again")
        ran.append(True)
        return backward(*dy)

    return guarded


def product_type(x: Tensor) -> torch.dtype:
    """Return the type in which x goes into products of matrices: autocast's, where that is on."""
    kind = x.device.type
    low = x.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if low else x.dtype


def for_products(x: Tensor) -> Tensor:
    """Return x in that type: cast once, rather than by each product."""
    return x.to(product_type(x))
