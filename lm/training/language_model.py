"""LanguageModel: how a network is fitted, by autograd.

Shapes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassExactMatch

from lm.bounds import checked
from lm.checkpoints import schema
from lm.checkpoints.restore import without_initialisation
from lm.data.module import IGNORED, TokenData
from lm.errors import UserError
from lm.models.layers import BatchNorm, calibrate
from lm.tokenizers import CHAT, Tokenizer, to_state
from lm.training import compatibility, compute, lightning_internals, recipes
from lm.training.callbacks import lightning
from lm.training.compute import compiler_missing, leave_constants, recompute_blocks
from lm.training.distributed.sharding import is_sharded, shard
from lm.training.division import Division
from lm.training.evaluation import Evaluated
from lm.training.finetune import take_weights
from lm.training.guard import Guard
from lm.training.optimizers import adamw
from lm.training.parts import make_net, make_optimizer
from lm.training.schedules import Constant, Schedule
from lm.training.step import Step, each_step


class LanguageModel(Evaluated):
    """Fits any network of `lm.models` by autograd.

    The network is built in `configure_model`, once the data's vocabulary and block size are known.

    Args:
        net: Makes the network from (vocab_size, block_size): a class_path with its other arguments.
        optimizer: Makes the optimizer from parameter groups. Its weight decay applies to matrices only. Default: AdamW
            with learning rate 1e-3 and weight decay 0.1.
        schedule: Factor on the learning rate, a pure function of the step; constant by default.
        clip_norm: Largest global norm of the gradient; larger ones are scaled down to it, each network's
            by itself. 0 and None never scale.
        steps_per_call: Optimizer steps in each step of the Trainer, whose loop costs about half a millisecond, more
            than a whole step of a small network; with 100, a hundredth of that. Evaluations, checkpoints and stops by a
            signal come at its multiples. For one process, in full precision, without accumulation.
        calibrate: Whether BatchNorm's running statistics are recomputed from the whole training split after the last
            step.
        on_nonfinite: What happens when the loss or the gradient is not finite: "stop" saves and ends the run before the
            update; "skip" skips the update, counts it, and stops after 20 in a row. All ranks do the same.
        spike: A loss above this many times its running mean over about 100 steps is treated the same; null for none.
        compile: Whether torch.compile compiles the network, which takes about a minute; without a compiler, a warning
            says so and the run goes on uncompiled. Checkpoints are the same either way. "auto" lets `lm fit` measure
            whether steps are then faster, by a tenth at least.
        activation_checkpointing: Whether blocks recompute their activations in the backward pass rather than keep them:
            less memory, a third more computation.
    """

    compiles = True
    """Whether model.compile is for it."""
    learns_from = "texts"
    """What the data must give: `TokenData.gives`."""
    writes = True
    """Whether the network writes text, if the data lets it."""
    calls_matter = False
    """Whether another steps_per_call is another algorithm, rather than the same steps in other portions."""

    @checked("model.", UserError)
    def __init__(
        self,
        net: Callable[[int, int], nn.Module],
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        schedule: Schedule | None = None,
        clip_norm: float | None = 1.0,
        steps_per_call: int = 1,
        calibrate: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        spike: float | None = None,
        compile: bool | Literal["auto"] = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.compiled, self.activation_checkpointing = compile, activation_checkpointing
        self.steps_per_call, self.calibrate = steps_per_call, calibrate
        # as the argument's default, its weight decay would be passed on to any other class that a recipe names
        self.make_net, self.make_optimizer = net, optimizer or adamw
        guard = Guard(on_nonfinite, spike)
        self.step = Step(self.objective, schedule or Constant(), clip_norm or None, guard, self.step_log)
        self.net: nn.Module | None = None
        self.tokenizer: Tokenizer | None = None
        self.config: dict[str, Any] | None = None
        """The resolved configuration, kept in checkpoints; set by the command line."""
        self.init_from: Path | None = None
        """The checkpoint whose weights a new run begins with; set by the command line."""
        self.resumes = False
        """Whether a checkpoint's weights are loaded before the first step; set by the command line."""
        self.origin = ""
        """Where a new run's weights are from, in words for its first line."""
        self.differences: list[recipes.Difference] = []
        """Where the recipe differs from that of the checkpoint that training resumes from."""

    # -- what is fitted

    def setup(self, stage: str) -> None:
        """Refuse settings that do not go together, and take over how the Trainer clips.

        Raises:
            UserError: steps_per_call is above 1 where only Lightning's own loop can take steps; calibrate is set for
                several processes, which would not share the statistics; or the Trainer is to clip by value.
        """
        trainer = self.trainer
        # not before: of a module without it, Lightning refuses a Trainer that clips or accumulates, which `step` does
        self.automatic_optimization = self.steps_per_call == 1
        if trainer.gradient_clip_algorithm == "value":
            raise UserError("trainer.gradient_clip_algorithm value: gradients are clipped by norm here")
        if trainer.gradient_clip_val is not None:
            self.step.clip_norm = float(trainer.gradient_clip_val) or None
        if self.calibrate and trainer.world_size > 1:
            raise UserError("model.calibrate is for one process, as each has statistics of its own: set it to false")
        if stage == "fit" and (count := getattr(trainer, "overfit_batches", 0)):
            raise UserError(f"trainer.overfit_batches is {count}: {lightning.SETTINGS['overfit_batches'][1]}")
        ranks, micro_batches = trainer.world_size, trainer.accumulate_grad_batches
        alone = ranks == micro_batches == 1 and trainer.precision in ("32-true", "64-true")
        if stage == "fit" and self.steps_per_call > 1 and not alone:
            raise UserError(
                f"model.steps_per_call {self.steps_per_call} is for one process without accumulation, in "
                f"trainer.precision 32-true or 64-true; here are {ranks}, trainer.accumulate_grad_batches "
                f"{micro_batches} and {trainer.precision}: set it to 1"
            )

    def configure_model(self) -> None:
        """Build the network for the data's vocabulary and block size."""
        if self.net is not None:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.writes = self.writes and getattr(data, "writes", True)
        if (found := getattr(data, "gives", self.learns_from)) != self.learns_from:
            raise UserError(
                f"model {type(self).__name__} learns from {self.learns_from}, and data {type(data).__name__} has "
                f"{found}: change one"
            )
        # initialising GPT-2 small takes a CPU a second and a half
        with without_initialisation() if self.resumes else nullcontext():
            trained = self.make_optimizer if compute.trains_in_memory(self.trainer) else None
            self.net = make_net(self.make_net, data.vocab_size, data.block_size, optimizer=trained)
        self.tokenizer = data.text_tokenizer
        with torch.device("cpu"):  # where batches are made, though Lightning has networks made on the GPU
            compatibility.check_data(self.net, data)
        if self.calibrate and not any(isinstance(module, BatchNorm) for module in self.net.modules()):
            raise UserError(f"model.calibrate: {type(self.net).__name__} has no BatchNorm: set it to false")
        if self.init_from is not None:
            self.origin = take_weights(self.net, self.make_net, data.text_tokenizer, self.init_from, self.config)
        self.change_network()
        if self.activation_checkpointing:
            for net in self.fitted:
                recompute_blocks(net)
        self._compile()
        if is_sharded(self.trainer):
            shard(self.net, self.trainer.strategy.device_mesh["data_parallel"])  # type: ignore[attr-defined]
        if getattr(data, "exact_match", False):
            self.exact_match = MulticlassExactMatch(data.vocab_size, ignore_index=IGNORED)
            self.share_right = getattr(data, "share_right", self.share_right)
        lengths = torch.tensor([len(token) for token in data.text_tokenizer.token_bytes()])
        self.register_buffer("token_lengths", lengths, persistent=False)
        leave_constants(self)

    def change_network(self) -> None:
        """Change the network that the recipe names, which has its first weights, before it is compiled and sharded."""

    def _compile(self) -> None:
        assert self.net is not None
        device = self.trainer.strategy.root_device
        if self.compiled is not True:  # lm fit has replaced "auto"; nothing else trains
            return
        if missing := compiler_missing(device):
            rank_zero_warn(f"model.compile: {missing} is missing here: going on without", stacklevel=2)
        else:
            self._use_compiler()

    def _use_compiler(self) -> None:
        assert self.net is not None
        self.net.compile()  # in place: no key of the state changes

    @property
    def fitted(self) -> list[nn.Module]:
        """The networks that are fitted, the first of which is saved, sampled and exported."""
        assert self.net is not None
        return [self.net]

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer over two groups: matrices, which decay, and vectors, which do not."""
        optimizer = make_optimizer(self.make_optimizer, *self.fitted)
        self.step.configure(self.fitted, optimizer)
        return optimizer

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the network's logits for tokens (B, T)."""
        assert self.net is not None
        logits: Tensor = self.net(tokens)
        return logits

    # -- a training step

    def on_train_start(self) -> None:
        """Set how the batch is divided, and start."""
        self.step.division = Division(self.trainer.world_size, self.trainer.accumulate_grad_batches)
        self.step.start(self.trainer, self.write)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless `training_step` takes several."""
        if self.steps_per_call == 1:
            if batch_idx % self.trainer.accumulate_grad_batches == 0:
                self.step.begin(self.global_step)
            for watcher in self.step.watching:
                watcher.before_step(self.net)

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the loss of a micro-batch, tokens and targets, whose backward pass follows."""
        tokens, targets = batch
        return self.step.loss(self(tokens), targets)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        """Return the loss of a micro-batch; or take several whole steps, and return None.

        Args:
            batch: tokens (B, T) and targets (B, T) or (B,); or, with steps_per_call K, both with a leading dimension K.
            batch_idx: Number of the batch in this process.
        """
        if self.steps_per_call == 1:
            return self.loss(*batch)
        for number, *one in each_step(self.global_step, self.trainer.max_steps, self.steps_per_call, batch):
            self.step.take(number, self._find_gradients, *one)
            self._finished(number)
        return None

    def _find_gradients(self, *batch: Tensor) -> None:
        """Set the parameters' gradients to those of a batch."""
        self.trainer.optimizers[0].zero_grad()
        self.loss(*batch).backward()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Do what lies between the backward pass and the update.

        Raises:
            CheckError: The loss or the gradient is not finite, and the run is to stop there.
        """
        self.step.settle(self.global_step + 1)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update the weights, then log the step: before any callback may save a checkpoint of it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        number = self.global_step + 1  # Lightning counts the step when this returns
        self.step.finish(number)
        self._finished(number)

    def _finished(self, number: int) -> None:
        """After the last step, calibrate."""
        if self.calibrate and number == self.trainer.max_steps:
            self._calibrate()

    def _calibrate(self) -> None:
        assert self.net is not None
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.eval_dataset("train")
        batches = (dataset[k][0].to(self.device) for k in range(len(dataset)))
        calibrate(self.net, batches)

    @property
    def metrics(self) -> dict[str, float]:
        """The newest training metrics, "step" among them."""
        return self.step.metrics

    def on_validation_start(self) -> None:
        """Let the guard judge the last step before it is evaluated."""
        self.step.decide()

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the checkpoint self-contained, and what a run needs to resume.

        Raises:
            CheckError: The guard does not trust the last step, which a GPU has left out.
        """
        self.step.decide()
        assert self.tokenizer is not None
        net: Any = self.net
        step, data = self.global_step, self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[schema.OURS] = schema.Saved(
            step=step,
            config=self.config,
            tokenizer=to_state(self.tokenizer),
            vocab_size=net.vocab_size,
            block_size=net.block_size,
            versions=compatibility.versions(),
            guard=self.step.guard.state_dict(),
            log=self.step_log.state_dict(step),
            sequences=data.sequences(step) if isinstance(data, TokenData) else None,
            writes=self.writes,
            train=self.step.metrics,
            validation=self.validation,
        ).entry()

    def check(self, checkpoint: dict[str, Any]) -> schema.Saved:
        """Return what a checkpoint holds; raises UserError where it is of another network, vocabulary or optimizer."""
        assert self.tokenizer is not None
        path, fits = self.trainer.ckpt_path, self.trainer.state.fn == "fit"
        return compatibility.check(path, checkpoint, self.state_dict(), self.config, self.tokenizer, optimizer=fits)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this network and vocabulary, and resume from its step.

        Raises:
            UserError: It is of another network or vocabulary.
        """
        saved = self.check(checkpoint)
        assert self.tokenizer is not None
        self.tokenizer.chat = saved.tokenizer.get(CHAT)
        self.step.metrics, self.validation = saved.train, saved.validation
        if self.trainer.state.fn == "fit":
            self.step.guard.load_state_dict(saved.guard)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.step_log.load_state_dict(saved.step, saved.logged())
            if isinstance(data, TokenData):
                data.go_on(saved.step, saved.consumed(data.batch_size))
            self.differences = recipes.between(saved.config, self.config) if saved.config and self.config else []
            lightning_internals.restore(self.trainer, checkpoint)
