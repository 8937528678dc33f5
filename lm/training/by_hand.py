"""StepByHand: a step's gradient by the rules of lm.backprop, for training and for what checks it.

Shapes: B sequences, T tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lm.backprop import Gradients, loss_and_gradients
from lm.backprop.rules import Collected
from lm.data.chunks import IGNORED
from lm.training.division import Division

Compiled = Callable[..., tuple[Tensor, list[Tensor | None]]]


class StepByHand:
    """Adds up the gradient of a step: `begin`, `add` for each of its micro-batches, `finish`.

    Args:
        net: The network.
        parameters: Those that are fitted.
        grads: Where gradients are added up.
        division: Of the batch, over ranks and micro-batches.
        compiled: What `compile_pass` returned; None for no compiler.
    """

    def __init__(
        self,
        net: nn.Module,
        parameters: list[nn.Parameter],
        grads: Gradients,
        *,
        division: Division | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self.net, self.parameters, self.grads = net, parameters, grads
        self.division, self.compiled = division or Division(), compiled

    @torch.no_grad()
    def begin(self) -> None:
        """Begin a step: nothing is known of the gradients."""
        self.grads.begin(self.parameters)

    @torch.no_grad()
    def add(self, tokens: Tensor, targets: Tensor, *, last: bool, eager: bool = False) -> Tensor:
        """Add the gradient of a micro-batch.

        Args:
            tokens: int64 (B, T).
            targets: int64, (B, T) or (B,).
            last: Whether it is this rank's last of the step.
            eager: Whether each layer is to be seen, so that no compiled graph may be used.

        Returns:
            The loss, as `Division.share` wants it.
        """
        if last:
            self.grads.last_pass()
        scale = self.division.weight(targets, self.parameters[0].dtype)
        if self.compiled is None or eager:
            loss = loss_and_gradients(self.net, self.grads, tokens, targets, ignore_index=IGNORED, scale=scale)
        else:
            loss, found = self.compiled(self.net, self.parameters, tokens, targets, scale)
            for parameter, gradient in zip(self.parameters, found, strict=True):
                if gradient is not None:
                    self.grads.add(parameter, gradient)
        return loss * scale * self.division.micro_batches if self.division.parts > 1 else loss

    def finish(self) -> None:
        """End the step on this rank: its gradients are whole, the mean over the ranks."""
        self.grads.finish()


def compile_pass() -> Compiled:
    """Return the forward and the backward pass as one graph; it draws the random numbers that it would uncompiled."""
    return torch.compile(_functional, dynamic=False, fullgraph=True, options={"fallback_random": True})


def _functional(
    net: nn.Module, parameters: list[nn.Parameter], tokens: Tensor, targets: Tensor, scale: float | Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    grads = Collected()
    loss = loss_and_gradients(net, grads, tokens, targets, ignore_index=IGNORED, scale=scale)
    return loss, [grads.found.get(parameter) for parameter in parameters]
