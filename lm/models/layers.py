"""Layers that several networks share.

Shapes: B batch, T time, C channels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Normalises each channel, the last dimension, by its mean and variance over all leading dimensions.

    Ioffe and Szegedy, "Batch Normalization" (2015). It differs from nn.BatchNorm1d in three ways: three-dimensional
    input has its channels last, statistics can be kept for each position, and the variance that normalises can be the
    unbiased one.

    Args:
        n_channels: C.
        n_positions: With a number, statistics are taken over the batch alone, for each of so many positions.
        momentum: Weight of a batch in the running statistics.
        bessel: Whether the variance that normalises is the sum of squares divided by N - 1 (Bessel's correction,
            unbiased) instead of N. The running variance is always the unbiased one.
        eps: Added to the variance.

    Raises:
        ValueError: momentum is outside (0, 1].
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        n_channels: int,
        *,
        n_positions: int | None = None,
        momentum: float = 0.1,
        bessel: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum}: it must be above 0 and at most 1")
        self.n_positions, self.momentum, self.bessel, self.eps = n_positions, momentum, bessel, eps
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))
        shape = (n_channels,) if n_positions is None else (n_positions, n_channels)
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self._sums: tuple[int, Tensor, Tensor] | None = None  # of calibration: count, mean, sum of squared deviations

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C) or (B, T, C).

        Raises:
            ValueError: In training mode, x has a single example for its statistics: its variance does not exist.
        """
        x = x.to(self.weight.dtype)  # under autocast it comes in 16 bits, too few for statistics
        if not self.training:
            return (x - self.running_mean) * (self.running_var + self.eps).rsqrt() * self.weight + self.bias
        rows = x.flatten(0, -2) if self.n_positions is None else x  # (B, T, C) -> (B T, C), or (B, T, C) as it is
        n = rows.shape[0]
        if n < 2:
            raise ValueError(
                "BatchNorm in training mode needs at least 2 examples for its variance: use a larger batch"
            )
        var, mean = torch.var_mean(rows, dim=0, correction=int(self.bessel))  # (C) or (T, C)
        self._remember(n, mean.detach(), var.detach())
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias

    @torch.no_grad()
    def _remember(self, n: int, mean: Tensor, var: Tensor) -> None:
        unbiased = var if self.bessel else var * (n / (n - 1))
        if self._sums is None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            return
        count, old_mean, squares = self._sums  # Chan, Golub and LeVeque (1979): merging two samples' statistics
        difference = mean.double() - old_mean
        squares = squares + unbiased.double() * (n - 1) + difference**2 * (count * n / (count + n))
        self._sums = count + n, old_mean + difference * (n / (count + n)), squares


@contextmanager
def _collecting(layers: list[BatchNorm]) -> Iterator[None]:
    for layer in layers:
        zero = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        layer._sums = 0, zero, zero
    try:
        yield
        for layer in layers:
            assert layer._sums is not None
            count, mean, squares = layer._sums
            if count > 1:
                layer.running_mean.copy_(mean)
                layer.running_var.copy_(squares / (count - 1))
    finally:
        for layer in layers:
            layer._sums = None


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> int:
    """Set every BatchNorm's running statistics to those of a whole data set, in one pass over it.

    Each layer sees the outputs of the layers before it in training mode, batch by batch. The first layer's statistics
    are exactly the data set's; later layers' get closer as batches get larger. Karpathy, "makemore" part 3.

    Args:
        net: A network; its mode is as before when this returns.
        batches: Inputs of the network, of at least 2 examples each.

    Returns:
        The number of BatchNorm layers; 0 means that nothing was done.
    """
    layers = [module for module in net.modules() if isinstance(module, BatchNorm)]
    if not layers:
        return 0
    was_training = net.training
    net.train()
    try:
        with _collecting(layers):
            for tokens in batches:
                net(tokens)
    finally:
        net.train(was_training)
    return len(layers)


class FlattenConsecutive(nn.Module):
    """Concatenates the channels of n consecutive positions; a single position left loses its dimension.

    Args:
        n: How many.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T/n, n C), or to (B, n C) where T is n."""
        B, T, C = x.shape  # noqa: N806
        x = x.reshape(B, T // self.n, self.n * C)  # (B, T, C) -> (B, T/n, n C)
        return x.squeeze(1) if x.shape[1] == 1 else x


def check_heads(n_embd: int, n_head: int) -> None:
    """Raise ValueError where heads do not divide the width."""
    if n_embd % n_head:
        raise ValueError(f"n_head {n_head} does not divide n_embd {n_embd}: choose n_embd as a multiple of n_head")


def check_length(tokens: Tensor, block_size: int) -> None:
    """Raise ValueError where tokens (B, T) are longer than the context."""
    if tokens.shape[1] > block_size:
        raise ValueError(f"a sequence of {tokens.shape[1]} tokens is longer than block_size {block_size}")


def initialise(net: nn.Module, std: float, branches: dict[nn.Module, int]) -> None:
    """Initialise as GPT-2: N(0, std), biases zero, residual projections scaled by 1/sqrt(residual branches).

    Each branch adds its variance to its stream; the scale keeps their sum at one branch's.

    Args:
        net: All of it.
        std: Standard deviation of the weights.
        branches: Stacks of blocks, whose projections are named c_proj, and the residual branches of each.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for stack, count in branches.items():
        for name, parameter in stack.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / count**0.5)


@torch.no_grad()
def rescale(net: nn.Module, factor: float) -> None:
    """Multiply the weights of all linear layers of a network by a factor."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(factor)


def padded(tokens: Tensor, size: int) -> Tensor:
    """Return tokens (B, T) with zeros, the padding symbol, in front, so that T is at least size.

    Fills the fixed context of a network at the beginning of a text.
    """
    missing = size - tokens.shape[1]
    return nn.functional.pad(tokens, (missing, 0)) if missing > 0 else tokens  # (B, T) -> (B, size)
