"""Optimizers that torch does not have, and which parameters each kind of update is for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lm.bounds import checked
from lm.errors import UserError


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Return a network's parameters in two groups, each parameter in exactly one: matrices, and vectors without decay.

    More groups would slow down each step of a small network. "n_hidden" says how many of a group's first parameters are
    hidden: matrices of linear layers inside the network, neither embedding nor output head, of a vocabulary or of one
    number. A head of one number comes right after them, where earlier checkpoints have its state. Where the network has
    a width (`GPT.base_width`), "width" is that, and "n_head" says how many of the last parameters are output heads.
    """
    tables = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)}
    outputs = (getattr(net, "vocab_size", None), 1)
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    inside = {id(module.weight) for module in linear if module.out_features not in outputs} - tables
    heads = {id(module.weight) for module in linear} - inside - tables
    fitted = [parameter for parameter in net.parameters() if parameter.requires_grad]
    hidden = [parameter for parameter in fitted if id(parameter) in inside]
    others = [parameter for parameter in fitted if parameter.ndim >= 2 and id(parameter) not in inside]
    if getattr(net, "width", None) is None:
        others.sort(key=lambda parameter: not (id(parameter) in heads and len(parameter) == 1))
    vectors = [parameter for parameter in fitted if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": hidden + others, "n_hidden": len(hidden)},
        {"params": vectors, "n_hidden": 0, "weight_decay": 0.0},
    ]
    if getattr(net, "width", None) is not None:  # only there: earlier checkpoints have no such keys
        groups[0] |= {"width": net.width, "n_head": sum(id(parameter) in heads for parameter in others)}
    return [group for group in groups if group["params"]]


def adamw(params: Iterable[Any]) -> Optimizer:
    """Return the default optimizer, for recipes that name none."""
    return AdamW(params, lr=1e-3, weight_decay=0.1)


class ScaledAdamW(AdamW):
    """AdamW whose rates for hidden matrices and the head are lr / (n_embd / base_width): see `GPT.base_width`.

    Their weight decay is multiplied by as much, so that a step's decay stays. Yang et al., "Tensor Programs V" (2022).

    Args:
        params: The groups of `parameter_groups`.
        lr: Learning rate of embeddings, biases and gains, and at base_width of all.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of matrices, at base_width.
        fused: Whether it runs as one kernel.

    Raises:
        UserError: The network has no base_width.
    """

    @checked("model.optimizer.", UserError)
    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 4e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        fused: bool | None = None,
    ) -> None:
        groups = []
        self.group_names: list[str] = []
        """Of each group: its learning rate is logged as learning_rate_hidden, or as learning_rate."""
        for group in params:
            first, last, settings = _parted(group)
            width: Any = group.get("width")
            if width is None and "weight_decay" not in settings:
                raise UserError("model.optimizer ScaledAdamW: the network has no base_width: say it, or use AdamW")
            if scaled := first + last:
                groups.append({"params": scaled, "lr": lr / width, "weight_decay": weight_decay * width, **settings})
                self.group_names.append("hidden")
            if rest := group["params"][len(first) : len(group["params"]) - len(last)]:
                groups.append({"params": rest, **settings})
                self.group_names.append("")
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def _parted(group: dict[str, Any]) -> tuple[list[nn.Parameter], list[nn.Parameter], dict[str, Any]]:
    """Return a group's hidden matrices, its output heads, and its settings."""
    hidden = group["params"][: group["n_hidden"]]
    heads = group["params"][len(group["params"]) - group.get("n_head", 0) :]
    return hidden, heads, {k: v for k, v in group.items() if k not in ("params", "n_hidden", "n_head", "width")}


class MuonAdamW(Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, head, biases and gains; both are torch's own.

    With `GPT.base_width`, AdamW's rate of the head is lr × base_width / n_embd; Muon's needs no such change, as its
    updates have the same spectral norm at all widths.

    One object, as the Trainer counts an optimizer's steps: two would count double. Jordan et al., "Muon" (2024).

    Args:
        params: The groups of `parameter_groups`.
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon; the spectral norm of an update of a square matrix.
        momentum: Of Muon.
        betas: Of AdamW.
        weight_decay: Of both.
        fused: Whether AdamW runs as one kernel.

    Raises:
        UserError: The network has no hidden matrix, or this torch has no Muon.
    """

    @checked("model.optimizer.", UserError)
    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 4e-3,
        muon_lr: float = 0.02,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        fused: bool | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError("model.optimizer MuonAdamW: this torch has no torch.optim.Muon: use torch 2.9 or newer")
        hidden, rest = [], []
        for group in params:
            inside, heads, settings = _parted(group)
            others = group["params"][len(inside) : len(group["params"]) - len(heads)]
            hidden += [{"params": inside, **settings}] if inside else []
            rest += [{"params": others, **settings}] if others else []
            if heads:
                width = group["width"]
                rest.append({"params": heads, "lr": lr / width, "weight_decay": weight_decay * width, **settings})
        if not hidden:
            raise UserError("model.optimizer MuonAdamW: the network has no hidden matrix: use torch.optim.AdamW")
        muon: dict[str, Any] = {
            "lr": muon_lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adjust_lr_fn": "original",
        }
        self.muon = torch.optim.Muon(hidden, **muon)
        self.adamw = AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused) if rest else None
        super().__init__([*self.muon.param_groups, *(self.adamw.param_groups if self.adamw else [])], {})
        self.group_names = ["muon"] * len(hidden) + [""] * len(rest)
        """Of each group: its learning rate is logged as learning_rate_muon, or as learning_rate."""
        self._share()

    def _share(self) -> None:
        """Let both work on this object's groups and state, so that schedules and checkpoints see one optimizer."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.muon.state = self.param_groups[:count], self.state
        if self.adamw:
            self.adamw.param_groups, self.adamw.state = self.param_groups[count:], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state, and share it again: loading makes new groups."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        if self.adamw:
            self.adamw.step()
        return loss
