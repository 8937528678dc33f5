"""LanguageModel: how a network is fitted, by autograd.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from lm import __version__
from lm.data.tokenizers import Tokenizer, identity
from lm.errors import CheckError, UserError
from lm.training import progress
from lm.training.metrics import TokenLoss
from lm.training.schedules import Constant, Schedule


class LanguageModel(LightningModule):
    """Fits any network of `lm.models` by autograd.

    The network is built in `configure_model`, where the data has said its vocabulary and block size.

    Args:
        net: Makes the network from (vocab_size, block_size): a class_path with its other arguments.
        optimizer: Makes the optimizer from parameter groups. Its weight decay applies to matrices only.
        schedule: Factor on the learning rate, a pure function of the step; constant by default.
        clip_norm: Largest global norm of the gradient; larger ones are scaled down to it. None never scales.
    """

    def __init__(
        self,
        net: Callable[[int, int], nn.Module],
        optimizer: Callable[[Iterable], Optimizer] = lambda params: AdamW(params, lr=1e-3, weight_decay=0.1),
        schedule: Schedule | None = None,
        clip_norm: float | None = 1.0,
    ) -> None:
        super().__init__()
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(f"model.clip_norm is {clip_norm}: it must be above 0, or null for none")
        self.make_net, self.make_optimizer = net, optimizer
        self.schedule = schedule or Constant()
        self.clip_norm = clip_norm
        self.net: nn.Module | None = None
        self.token_lengths: Tensor  # bytes of each id (V,)
        self.tokenizer: Tokenizer | None = None
        self.config: dict[str, Any] | None = None
        """The resolved configuration, kept in checkpoints; set by the command line."""
        self.metrics: dict[str, float] = {}
        """The newest training metrics, "step" among them."""
        self.validation: dict[str, float] = {}
        """The newest validation metrics, "step" among them."""
        self.train_loss = TokenLoss()
        self.eval_loss = TokenLoss()
        self._step_losses: list[Tensor] = []  # of the micro-batches of the step in progress
        self._micro_tokens = 0
        self._grad_norm = torch.zeros(())
        self._settings: list[dict[str, Any]] = []  # each parameter group's, as configured
        self._clock = (0.0, 0)  # time and step at which the throughput measurement began

    # -- what is fitted

    def configure_model(self) -> None:
        """Build the network for the data's vocabulary and block size."""
        if self.net is not None:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        try:
            self.net = self.make_net(data.vocab_size, data.block_size)
        except ValueError as error:
            raise UserError(f"model.net: {error}") from error
        self.tokenizer = data.text_tokenizer
        lengths = torch.tensor([len(token) for token in data.text_tokenizer.token_bytes()])
        self.register_buffer("token_lengths", lengths, persistent=False)

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer over two groups: matrices, which decay, and vectors, which do not."""
        assert self.net is not None
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        try:
            optimizer = self.make_optimizer([group for group in groups if group["params"]])
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}") from error
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, grouped)) == sorted(map(id, parameters)), "each parameter belongs to exactly one group"
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return optimizer

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the network's logits for tokens (B, T)."""
        assert self.net is not None
        return self.net(tokens)

    # -- a training step

    def on_train_start(self) -> None:
        """Let the configuration win over what a checkpoint said of learning rates and decay."""
        for group, settings in zip(self.trainer.optimizers[0].param_groups, self._settings, strict=True):
            group.update(settings)
        self._clock = (time.monotonic(), self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_losses.clear()
            factor = self.schedule(self.global_step, self.trainer.max_steps)
            for group, settings in zip(self.trainer.optimizers[0].param_groups, self._settings, strict=True):
                group["lr"] = settings["lr"] * factor

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a micro-batch of tokens and targets, both (B, T)."""
        tokens, targets = batch
        logits = self(tokens)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())  # (B T, V), (B T,) -> ()
        self._step_losses.append(loss.detach())
        self._micro_tokens = targets.numel()
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient, stop where it is not finite, and clip its norm, all before the weights are touched.

        Raises:
            CheckError: The loss or the gradient is not finite. A loss scaler expects that of gradients now and then,
                and skips the step itself; then only the loss counts.
        """
        if gradient_clip_algorithm == "value":
            raise UserError("trainer.gradient_clip_algorithm value: gradients are clipped by norm here")
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = torch.stack(self._step_losses).mean()
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not torch.isfinite(loss if scaled else loss + norm):
            raise CheckError(
                f"step {self.global_step + 1}: loss {float(loss):g} and gradient norm {float(norm):g} are not finite: "
                "nothing was updated; continue with --ckpt_path last and a lower learning rate or longer warm-up"
            )
        clip_norm = self.clip_norm if gradient_clip_val is None else gradient_clip_val
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        self._grad_norm = norm

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update the weights, then log the step: before any callback may save a checkpoint of it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._log_step(self.global_step + 1)  # Lightning counts the step when this returns

    def _log_step(self, step: int) -> None:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (not every or step % every) and step not in (1, self.trainer.max_steps):
            return
        for loss in self._step_losses:
            self.train_loss.update(loss * self._micro_tokens, self._micro_tokens)
        values = self.train_loss.compute()
        self.train_loss.reset()
        tokens_per_step = int(values["tokens"])
        began, first = self._clock
        self._clock = (time.monotonic(), step)
        self.metrics = {
            "step": step,
            "loss": float(values["loss"]),
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": float(self._grad_norm),
            "tokens": step * tokens_per_step,
            "tokens_per_second": (step - first) * tokens_per_step / max(1e-9, self._clock[0] - began),
        }
        self._write({f"train/{key}": value for key, value in self.metrics.items() if key != "step"}, step)

    # -- evaluation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch of tokens and targets, both (B, T), to the evaluation's sums."""
        tokens, targets = batch
        logits = self(tokens).flatten(0, -2)  # (B, T, V) -> (B T, V)
        precise = logits.float() if logits.dtype.itemsize < 4 else logits  # sums in 16 bits lose digits
        nats = F.cross_entropy(precise, targets.flatten(), reduction="sum")
        self.eval_loss.update(nats, targets.numel(), self.token_lengths[targets].sum())

    def on_validation_epoch_end(self) -> None:
        """Publish the evaluation: `val_loss` for callbacks, all of it for the loggers."""
        values = self.eval_loss.compute()
        self.eval_loss.reset()
        self.log("val_loss", values["loss"], logger=False)  # the metric has summed over the ranks
        self.validation = {"step": self.global_step} | {key: float(value) for key, value in values.items()}
        self.validation["tokens"] = int(values["tokens"])
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            chosen = ("loss", "perplexity", "bits_per_byte")
            self._write({f"val/{key}": self.validation[key] for key in chosen}, self.global_step)

    def on_validation_end(self) -> None:
        """Keep the time of the evaluation out of tokens_per_second."""
        self._clock = (time.monotonic(), self.global_step)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the evaluation's sums."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Publish the evaluation."""
        self.on_validation_epoch_end()

    def _write(self, values: dict[str, float], step: int) -> None:
        """Give values to the loggers, under the number of finished steps."""
        for logger in self.trainer.loggers:
            logger.log_metrics({k: v for k, v in values.items() if not math.isnan(v)}, step=step)

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the checkpoint self-contained."""
        assert self.net is not None and self.tokenizer is not None
        checkpoint["lm"] = {
            "config": self.config,
            "tokenizer": self.tokenizer.state(),
            "vocab_size": self.net.vocab_size,
            "block_size": self.net.block_size,
            "versions": versions(),
            "train": self.metrics,
            "validation": self.validation,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this network and vocabulary, and take over its step.

        Raises:
            UserError: It is of another one.
        """
        assert self.net is not None and self.tokenizer is not None
        path = self.trainer.ckpt_path
        saved: dict[str, Any] = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
        built: dict[str, Any] = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        if self.config is not None:  # not all that matters shows in the shapes: the number of heads does not
            saved = _flat(checkpoint["lm"]["config"]) | saved
            built = _flat(self.config) | built
        for key in (*saved, *built):
            there, here = saved.get(key, "missing"), built.get(key, "missing")
            if there != here and ((key in saved and key in built) or key.startswith("net.")):
                raise UserError(
                    f"{path} is of another architecture: {key} is {there} there and {here} in this configuration: use "
                    "the configuration that it was trained with"
                )
        if identity(checkpoint["lm"]["tokenizer"]) != identity(self.tokenizer.state()):
            raise UserError(f"{path} has another vocabulary than data.corpus and data.tokenizer give: use its data")
        self.metrics, self.validation = checkpoint["lm"]["train"], checkpoint["lm"]["validation"]
        if self.trainer.state.fn == "fit":
            there, here = (config and _optimizer(config) for config in (checkpoint["lm"]["config"], self.config))
            if there and here and there != here:
                raise UserError(f"{path} has the state of {there}, the recipe says {here}: use the same optimizer")
            progress.restore(self.trainer, checkpoint)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the network's function: its class and arguments, dropout aside."""
    net = config["model"]["init_args"]["net"]
    arguments = {k: v for k, v in (net.get("init_args") or {}).items() if k != "dropout"}
    return {"class_path": net["class_path"]} | arguments


def _optimizer(config: dict[str, Any]) -> str:
    return config["model"]["init_args"]["optimizer"]["class_path"]


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    names = ("torch", "lightning", "torchmetrics", "numpy", "tiktoken")
    ours = {"lm": __version__, "python": platform.python_version()}
    return ours | {name: metadata.version(name) for name in names}
