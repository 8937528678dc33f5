"""ManualLanguageModel: how a network is fitted by gradients derived by hand, without autograd.

Shapes: B sequences, T tokens, K steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lm.backprop import Gradients, NoRuleError, check, loss_and_gradients
from lm.backprop.compare import Collected, against_autograd
from lm.bounds import checked
from lm.data.module import IGNORED
from lm.errors import CheckError, UserError
from lm.models.layers import BatchNorm
from lm.training import progress
from lm.training.language_model import LanguageModel
from lm.training.reduced import ReducedGradients, average
from lm.training.sharded import is_sharded


class ManualLanguageModel(LanguageModel):
    """Fits any network of `lm.models` by the rules of `lm.backprop`: the same numbers, and no graph.

    Checkpoints are `LanguageModel`'s: a run may begin with one and go on with the other. Of several processes, each
    normalises by its own batch's BatchNorm statistics, as under DDP, so two ranks are one rank on the same global batch
    for networks without BatchNorm alone; running statistics are averaged over the ranks before each evaluation and
    checkpoint.

    Args:
        compile: Whether torch.compile makes one graph of the forward and the backward pass. It needs a C++ compiler
            and a minute; dropout then draws other numbers.
        audit_every: Steps between audits, which compare the gradient by the rules with autograd's and stop the run
            where they disagree; null for none.
        settings: All that `LanguageModel` takes.
    """

    @checked("model.", UserError)
    def __init__(self, *, compile: bool = False, audit_every: int | None = None, **settings: Any) -> None:
        super().__init__(compile=compile, **settings)
        self.automatic_optimization = False
        self.audit_every = audit_every
        self.accumulate = 1
        """Micro-batches of a step. The Trainer's own number, which it refuses for manual optimization when it starts;
        the command line moves it here."""
        self._grads = Gradients()
        self._compiled: Callable[..., tuple[Tensor, list[Tensor | None]]] | None = None

    def setup(self, stage: str) -> None:
        """Refuse what the rules cannot do, and count micro-batches as `accumulate` says.

        Raises:
            UserError: Precision or strategy is one that the rules are not for.
        """
        super().setup(stage)
        trainer = self.trainer
        if self.activation_checkpointing:
            raise UserError(
                "model.activation_checkpointing with ManualLanguageModel: rules keep what they need: set it to false"
            )
        if stage != "fit":
            return
        check_precision(trainer.precision)
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            name = "fsdp2" if is_sharded(trainer) else type(trainer.strategy).__name__
            raise UserError(
                f"trainer.strategy {name} with ManualLanguageModel: the rules need whole "
                "parameters on each device; use ddp"
            )
        trainer.accumulate_grad_batches = self.accumulate

    def configure_model(self) -> None:
        """Build the network, and see that every layer has a rule."""
        super().configure_model()
        assert self.net is not None
        try:
            check(self.net)
        except NoRuleError as error:
            raise UserError(f"model.net: {error}") from error

    def _use_compiler(self) -> None:
        self._compiled = torch.compile(_functional, dynamic=False, fullgraph=True)

    def on_train_start(self) -> None:
        """Make what gathers the gradients, of several processes in buckets."""
        super().on_train_start()
        assert self.net is not None
        if self.trainer.world_size > 1:
            self._grads = ReducedGradients(self.net, self.trainer.world_size)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add the gradient of a micro-batch, and update after the last of a step; or take several whole steps.

        Args:
            batch: tokens (B, T) and targets (B, T) or (B,); or, with steps_per_call K, both with K in front.
            batch_idx: Number of the batch in this process.
        """
        if self.steps_per_call > 1:
            return self._take_steps(*batch)
        last = progress.step_finished(self.trainer, batch_idx)
        self._find_gradients(*batch, first=batch_idx % self.accumulate == 0, last=last)
        return self._update(self.global_step + 1) if last else None

    @torch.no_grad()
    def _find_gradients(self, tokens: Tensor, targets: Tensor, first: bool = True, last: bool = True) -> None:
        assert self.net is not None
        if first:
            self._grads.begin(self._fitted)
            if self.audit_every and (self.global_step + 1) % self.audit_every == 0:
                self._audit(tokens, targets, self.global_step + 1)
        if last:
            self._grads.last_pass()
        for watcher in self._watching:
            watcher.before_backward(self._grads)
        try:
            loss = self._pass(tokens, targets, self._scale(targets))
        except ValueError as error:
            if "predictions" not in str(error):
                raise
            raise UserError(f"model.net: {error}: see data.targets, and LinesData for fixed contexts") from error
        self._note(loss * self._scale(targets) * self.accumulate if self._divided else loss, targets)
        if last:
            self._grads.finish()

    def _scale(self, targets: Tensor) -> float | Tensor:
        """Return the weight of a micro-batch's mean loss in the step's, see `share_loss`."""
        if not self._divided:
            return 1.0
        return (targets != IGNORED).sum().to(self._fitted[0].dtype) / (targets.numel() * self.accumulate)

    def _pass(self, tokens: Tensor, targets: Tensor, scale: float | Tensor) -> Tensor:
        """Add scale times the gradient of the mean loss, and return that."""
        assert self.net is not None
        if self._compiled is None or self._watching:  # what is looked at is not in a compiled graph
            return loss_and_gradients(self.net, self._grads, tokens, targets, ignore_index=IGNORED, scale=scale)
        loss, found = self._compiled(self.net, self._fitted, tokens, targets, scale)
        for parameter, gradient in zip(self._fitted, found, strict=True):
            if gradient is not None:
                self._grads.add(parameter, gradient)
        return loss

    def _audit(self, tokens: Tensor, targets: Tensor, step: int) -> None:
        """Compare the gradient of a batch with autograd's.

        Raises:
            CheckError: They disagree, on any rank: all stop, or the others would wait for this one.
        """
        assert self.net is not None
        low = torch.is_autocast_enabled(tokens.device.type)
        dtype = torch.bfloat16 if low else next(self.net.parameters()).dtype
        table = against_autograd(self.net, tokens, targets, dtype)
        worst = max(table, key=lambda row: row.relative)
        self.write({"audit/relative": worst.relative}, step)
        wrong = torch.tensor(float(not all(row.approximate for row in table)), device=tokens.device)
        if self.trainer.strategy.reduce(wrong, reduce_op="sum"):
            raise CheckError(
                f"step {step}: the gradient by hand and autograd's disagree at {worst.name} by {worst.relative:.2g} of "
                "its size: nothing was updated; compare them by lm gradients, and mend the rule"
            )

    def on_validation_epoch_start(self) -> None:
        """Let all ranks evaluate the same network."""
        self._share_statistics()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the ranks' average statistics: the checkpoint's tensors are the network's own, so it changes too."""
        self._share_statistics()
        super().on_save_checkpoint(checkpoint)

    def _share_statistics(self) -> None:
        if self.trainer.world_size == 1:
            return
        assert self.net is not None
        for module in self.net.modules():
            if isinstance(module, BatchNorm):
                average([module.running_mean, module.running_var])


def _functional(
    net: nn.Module, parameters: list[nn.Parameter], tokens: Tensor, targets: Tensor, scale: float | Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and the gradients; torch.compile prefers results to what is changed in passing."""
    grads = Collected()
    loss = loss_and_gradients(net, grads, tokens, targets, ignore_index=IGNORED, scale=scale)
    return loss, [grads.found.get(parameter) for parameter in parameters]


def check_precision(precision: Any) -> None:
    """Refuse a Trainer's precision that the rules are not for.

    On a CPU, Lightning turns 16-mixed into bf16-mixed by itself, so the command line asks before the Trainer is made.

    Raises:
        UserError: Which, why and what to do.
    """
    if str(precision) not in ("32-true", "32", "64-true", "64", "bf16-mixed", "None"):
        raise UserError(
            f"trainer.precision {precision} with ManualLanguageModel: gradients by hand are kept in 32 bits or more, "
            "and small ones in 16-bit floats would need a loss scaler, which works by autograd; use bf16-mixed, "
            "32-true or 64-true"
        )
