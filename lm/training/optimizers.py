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
    hidden: matrices of linear layers inside the network, neither embedding nor output head.
    """
    tables = {id(module.weight) for module in net.modules() if isinstance(module, nn.Embedding)}
    vocab_size = getattr(net, "vocab_size", None)
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    inside = {id(module.weight) for module in linear if module.out_features != vocab_size} - tables
    fitted = [parameter for parameter in net.parameters() if parameter.requires_grad]
    hidden = [parameter for parameter in fitted if id(parameter) in inside]
    others = [parameter for parameter in fitted if parameter.ndim >= 2 and id(parameter) not in inside]
    vectors = [parameter for parameter in fitted if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": hidden + others, "n_hidden": len(hidden)},
        {"params": vectors, "n_hidden": 0, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(params: Iterable[Any]) -> Optimizer:
    """Return the default optimizer, for recipes that name none."""
    return AdamW(params, lr=1e-3, weight_decay=0.1)


class MuonAdamW(Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, head, biases and gains; both are torch's own.

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
            settings = {key: value for key, value in group.items() if key not in ("params", "n_hidden")}
            inside, others = group["params"][: group["n_hidden"]], group["params"][group["n_hidden"] :]
            hidden += [{"params": inside, **settings}] if inside else []
            rest += [{"params": others, **settings}] if others else []
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
