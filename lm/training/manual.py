"""ManualLanguageModel: how a network is fitted by gradients derived by hand, without autograd.

Shapes: B sequences, T tokens, K steps.
"""

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn

from lm.backprop import Gradients, NoRuleError, check
from lm.bounds import checked
from lm.errors import CheckError, UserError
from lm.models.layers import BatchNorm
from lm.training import audit, lightning_internals
from lm.training.by_hand import Compiled, StepByHand, compile_pass
from lm.training.compute import blocks
from lm.training.distributed.reduction import ReducedGradients, ShardedGradients, average
from lm.training.distributed.sharding import is_sharded
from lm.training.language_model import LanguageModel


class ManualLanguageModel(LanguageModel):
    """Fits any network of `lm.models` by the rules of `lm.backprop`: the same numbers, and no graph.

    Checkpoints are `LanguageModel`'s: a run may start with one class and resume with the other. With several processes,
    each normalises by the BatchNorm statistics of its own batch, as under DDP, so only networks without BatchNorm train
    alike on two ranks and on one with the same global batch. Running statistics are averaged over the ranks before each
    evaluation and checkpoint.

    Args:
        compile: Whether torch.compile compiles the forward and the backward pass into one graph. It needs a C++
            compiler and a minute. "auto" lets `lm fit` measure whether steps are then faster, by a tenth at least.
        audit_every: Steps between audits, which compare the gradient by the rules with autograd's and stop the run
            where they disagree; null for none.
        settings: All that `LanguageModel` takes.
    """

    @checked("model.", UserError)
    def __init__(
        self, *, compile: bool | Literal["auto"] = False, audit_every: int | None = None, **settings: Any
    ) -> None:
        super().__init__(compile=compile, **settings)
        self.audit_every = audit_every
        self._compiled: Compiled | None = None
        self._audit: audit.Reference | None = None  # of the step in progress, where it is due

    def setup(self, stage: str) -> None:
        """Refuse what the rules do not support.

        Raises:
            UserError: The rules do not support the precision or the strategy, or what is set besides.
        """
        super().setup(stage)
        self.automatic_optimization, trainer = False, self.trainer
        if stage != "fit":
            return
        check_precision(trainer.precision)
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            name = type(trainer.strategy).__name__
            raise UserError(
                f"trainer.strategy {name} with ManualLanguageModel: the rules need whole parameters: use ddp, or fsdp2"
            )
        if self.compiled is True and (is_sharded(trainer) or self.activation_checkpointing):
            other = "trainer.strategy fsdp2" if is_sharded(trainer) else "model.activation_checkpointing"
            raise UserError(f"model.compile with {other} and ManualLanguageModel: one graph would keep all: drop one")
        if self.audit_every and is_sharded(trainer):
            raise UserError("model.audit_every with trainer.strategy fsdp2: an audit needs the whole network: drop one")

    def configure_model(self) -> None:
        """Build the network, and check that every layer has a rule."""
        super().configure_model()
        assert self.net is not None
        try:
            check(self.net)
        except NoRuleError as error:
            raise UserError(f"model.net: {error}") from error

    def _use_compiler(self) -> None:
        self._compiled = compile_pass()

    def on_train_start(self) -> None:
        """Make the gradient accumulator; with several processes, it reduces in buckets."""
        super().on_train_start()
        assert self.net is not None
        ranks = self.trainer.world_size
        if is_sharded(self.trainer):
            grads: Gradients = ShardedGradients(self.net)
        else:
            grads = ReducedGradients(nn.ModuleList(self.fitted), ranks) if ranks > 1 else Gradients()
        if self.activation_checkpointing:
            grads.recomputed = {block for net in self.fitted for block in blocks(net)}
        self.step.check = self._check_gradients
        self._by_hand = StepByHand(
            self.net, self.step.fitted, grads, division=self.step.division, compiled=self._compiled
        )

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        """Add the gradient of a micro-batch, and update after the last of a step; or take several whole steps.

        Args:
            batch: tokens (B, T) and targets (B, T) or (B,); or, with steps_per_call K, both with a leading dimension K.
            batch_idx: Number of the batch in this process.
        """
        if self.steps_per_call > 1:
            return super().training_step(batch, batch_idx)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        last = lightning_internals.step_finished(self.trainer, batch_idx)
        self._find_gradients(*batch, first=first, last=last)
        if last:
            self.step.update(number := self.global_step + 1)
            self._finished(number)
        return None

    @torch.no_grad()
    def _find_gradients(self, *batch: Tensor, first: bool = True, last: bool = True) -> None:
        assert self.net is not None
        step = self._by_hand
        if first:
            step.begin()
            due = self.audit_every and (self.global_step + 1) % self.audit_every == 0
            self._audit = audit.Reference(self.net) if due else None
            self._rules = audit.rules_in_float64(self.net, *batch[:2]) if due else []
        if self._audit is not None:
            self._audit.see(*batch[:2])
        for watcher in self.step.watching:
            watcher.before_backward(step.grads)
        self.loss_by_hand(*batch, last=last)
        if last:
            step.finish()

    def loss_by_hand(self, *batch: Tensor, last: bool) -> Tensor:
        """Return the loss of a micro-batch, the step's last or not, after adding its gradient; of tokens, targets."""
        tokens, targets = batch
        try:  # a compiled graph shows watchers nothing
            loss = self._by_hand.add(tokens, targets, last=last, eager=bool(self.step.watching))
        except ValueError as error:
            if "predictions" not in str(error):
                raise
            raise UserError(f"model.net: {error}: see data.targets, and LinesData for fixed contexts") from error
        self.step.note(loss, targets)
        return loss

    def _check_gradients(self, loss: Tensor | float) -> None:
        """Compare the step's loss and gradient with autograd's, where an audit is due.

        Raises:
            CheckError: They disagree on some rank. All ranks stop, or the others would wait for that one.
        """
        if self._audit is None:
            return
        ranks, step = self.trainer.strategy, self.global_step + 1
        alone = self.trainer.world_size == 1
        table = self._audit.compare(loss, total=None if alone else lambda sums: ranks.reduce(sums, reduce_op="sum"))
        table += [row for row in self._rules if not row.approximate]
        worst = max(table, key=lambda row: (not row.approximate, row.relative))
        self._audit = None
        self.write({"audit/relative": worst.relative}, step)
        wrong = torch.tensor(float(not worst.approximate), device=self.device)
        if ranks.reduce(wrong, reduce_op="sum"):
            raise CheckError(
                f"step {step}: the gradient by hand and autograd's disagree at {worst.name} by {worst.relative:.2g} of "
                "its size: nothing was updated; compare them by lm gradients, and mend the rule"
            )

    def on_validation_epoch_start(self) -> None:
        """Let all ranks evaluate the same network."""
        self._share_statistics()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the ranks' average statistics; the checkpoint has the network's own tensors, so both change."""
        self._share_statistics()
        super().on_save_checkpoint(checkpoint)

    def _share_statistics(self) -> None:
        if self.trainer.world_size == 1:
            return
        assert self.net is not None
        for module in self.net.modules():
            if isinstance(module, BatchNorm):
                average([module.running_mean, module.running_var])


def check_precision(precision: Any) -> None:
    """Refuse a Trainer's precision that the rules do not support.

    On a CPU, Lightning turns 16-mixed into bf16-mixed by itself, so the command line calls this before the Trainer is
    made.

    Raises:
        UserError: The rules do not support it; says why and what to do.
    """
    if str(precision) not in ("32-true", "32", "64-true", "64", "bf16-mixed", "None"):
        raise UserError(
            f"trainer.precision {precision} with ManualLanguageModel: gradients by hand are kept in 32 bits or more, "
            "and small ones in 16-bit floats would need a loss scaler, which works by autograd; use bf16-mixed, "
            "32-true or 64-true"
        )
