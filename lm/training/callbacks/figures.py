"""Figures: a few cheap pictures of training in TensorBoard, each of which can be switched off.

Karpathy, "makemore" part 3: what activations, gradients and updates should look like.

Shapes: B batch, H heads, T time.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lm.backprop import Gradients
from lm.bounds import checked
from lm.errors import UserError
from lm.training.callbacks import pictures
from lm.training.distributed.sharding import is_sharded
from lm.training.harmless import harmless

SATURATED = 0.97  # a tanh beyond it passes less than 6 % of its gradient on
MOST_ROWS = 1000  # of an embedding table in the projector
MOST_POSITIONS = 32  # of an attention map, and of the rows of dlogits
MOST_EXAMPLES = 64  # in the picture of units that pass no gradient
LAYOUT = {  # charts of many curves, in the order of their use
    "training": {
        "loss": ["Multiline", ["train/loss$", "val/loss$"]],
        "update sizes: log10, about -3 is healthy": ["Multiline", [r"update_ratio/.*"]],
        "dead units": ["Multiline", [r"dead_units/.*"]],
        "share of saturated tanh units": ["Multiline", [r"saturation/.*"]],
        "residual branches: share of the gradient": ["Multiline", [r"residual_share/.*"]],
    }
}


class Figures(Callback):
    """Writes figures at the first step and every `every_n_steps` steps; the module calls the hooks around its update.

    Lightning's own hooks do not fit: they surround a batch, which may be many steps.

    Args:
        every_n_steps: Steps between figures; 0 switches all of them off.
        activations: Histograms of each layer's output, except LayerNorm's and the like, which always look the same.
        gradients: Histograms of each matrix's gradient, after clipping.
        saturation: For each tanh layer, the share of outputs whose absolute value is above 0.97; for each tanh and ReLU
            layer, which units pass no gradient at which examples, and the number of dead units, which pass none at all.
        updates: For each matrix, log10 of the update's standard deviation over the parameter's; about -3 is healthy.
        attention: Attention maps of the first validation sequence, one panel per head, at every validation.
        embedding: The token embedding in the projector, when training ends.
    """

    @checked("figures.", UserError)
    def __init__(
        self,
        *,
        every_n_steps: int = 500,
        activations: bool = True,
        gradients: bool = True,
        saturation: bool = True,
        updates: bool = True,
        attention: bool = True,
        embedding: bool = True,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.activations, self.gradients, self.saturation = activations, gradients, saturation
        self.updates, self.attention, self.embedding = updates, attention, embedding
        self._loggers: list[TensorBoardLogger] = []
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}  # each layer's output
        self._saturated: dict[str, Tensor] = {}
        self._stuck: dict[str, Tensor] = {}  # which units pass no gradient: (N, C)
        self._labels: list[str] = []  # of the vocabulary: 'x', '\\n'
        self._gradients: dict[str, Tensor] = {}
        self._grads: Gradients | None = None  # of a backward pass by hand
        self._before: dict[str, Tensor] = {}  # matrices before the update

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find where to write: on rank 0 alone, and nowhere for a sharded network, of which it has only a shard."""
        writes = trainer.is_global_zero and self.every_n_steps and not is_sharded(trainer)
        self._loggers = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)] if writes else []
        if self._loggers:
            self._lay_out(pl_module.tokenizer)

    @property
    def _boards(self) -> list[Any]:
        """The loggers' writers, asked for each time: a logger whose file was removed has a new one."""
        return [logger.experiment for logger in self._loggers]

    @harmless
    def _lay_out(self, tokenizer: Any) -> None:
        """Keep the names of the tokens, and group the charts."""
        self._labels = [repr(token.decode(errors="replace")) for token in tokenizer.token_bytes()[:MOST_ROWS]]
        for board in self._boards:
            board.add_custom_scalars(LAYOUT)

    def due(self, step: int) -> bool:
        """Return whether the step of that number, counted from 1, is shown."""
        return bool(self._loggers) and (step == 1 or step % self.every_n_steps == 0)

    @harmless
    def before_step(self, net: Any) -> None:
        """Start recording the layers' outputs."""
        if self._handles:  # of an earlier micro-batch of the step
            return
        for name, module in net.named_modules():
            if (
                isinstance(module, nn.Tanh | nn.Sigmoid | nn.ReLU | nn.GELU | nn.Linear)
                or "BatchNorm" in type(module).__name__
            ):
                self._handles.append(module.register_forward_hook(self._look(name)))

    def _look(self, name: str) -> Any:
        @harmless
        def look(self: Figures, module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.activations:
                self._seen[name] = output.detach().clone()  # a later layer may work in place
            if self.saturation and isinstance(module, nn.Tanh):
                self._saturated[name] = (output.detach().abs() > SATURATED).float().mean()
            if self.saturation and isinstance(module, nn.Tanh | nn.ReLU):
                units = output.detach().flatten(0, -2)  # (N, C)
                self._stuck[name] = units.abs() > SATURATED if isinstance(module, nn.Tanh) else units <= 0

        return partial(look, self)

    @harmless
    def before_backward(self, grads: Gradients) -> None:
        """Have a backward pass by hand keep what autograd does not show."""
        grads.keep_dlogits, grads.shares = True, {}
        self._grads = grads

    @harmless
    def before_update(self, net: Any) -> None:
        """Keep the gradients and the matrices as they are before the update."""
        for name, parameter in net.named_parameters():
            if self.gradients and parameter.grad is not None and parameter.ndim >= 2:
                self._gradients[name] = parameter.grad.detach().clone()
            if self.updates and parameter.ndim >= 2:
                self._before[name] = parameter.detach().clone()

    @harmless
    def after_step(self, net: Any, step: int) -> None:
        """Write what was recorded, and stop recording."""
        try:
            self._write(net, step)
        finally:
            self._forget()

    def _write(self, net: Any, step: int) -> None:
        for board in self._boards:
            for name, value in self._seen.items():
                _histogram(board, f"activations/{name}", value, step)
            for name, value in self._gradients.items():
                _histogram(board, f"gradients/{name}", value, step)
            for name, value in self._saturated.items():
                board.add_scalar(f"saturation/{name}", float(value), step)
            for name, stuck in self._stuck.items():
                board.add_scalar(f"dead_units/{name}", int(stuck.all(0).sum()), step)
                rows = min(len(stuck), MOST_EXAMPLES)
                title = f"{name}: units (columns) that pass no gradient, at {rows} examples (rows)"
                picture = pictures.stuck_units(stuck[:MOST_EXAMPLES], title)
                board.add_image(f"dead_units/{name}", picture, step, dataformats="HWC")
            for name, parameter in net.named_parameters():
                if name in self._before:
                    ratio = float((parameter.detach() - self._before[name]).std() / self._before[name].std())
                    if ratio > 0 and math.isfinite(ratio):
                        board.add_scalar(f"update_ratio/{name}", math.log10(ratio), step)
            self._write_by_hand(board, net, step)

    def _write_by_hand(self, board: Any, net: Any, step: int) -> None:
        """Write the loss's gradient by the logits as an image, and each residual branch's share of the gradient."""
        if self._grads is None:
            return
        if self._grads.dlogits is not None:
            rows = self._grads.dlogits[:MOST_POSITIONS, :MOST_ROWS].float()  # (N, V)
            picture = pictures.dlogits(rows, [_symbol(label) for label in self._labels])
            board.add_image("gradients/dlogits", picture, step, dataformats="HWC")
        names = {module: name for name, module in net.named_modules()}
        for branch, share in (self._grads.shares or {}).items():
            board.add_scalar(f"residual_share/{names[branch]}", float(share), step)

    def _forget(self) -> None:
        if self._grads is not None:
            self._grads.keep_dlogits, self._grads.shares, self._grads.dlogits = False, None, None
            self._grads = None
        while self._handles:
            self._handles.pop().remove()
        for found in (self._seen, self._saturated, self._stuck, self._gradients, self._before):
            found.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop recording."""
        self._forget()

    @harmless
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the attention maps of one validation sequence."""
        net: Any = pl_module.net
        if not (self._loggers and self.attention and hasattr(net, "attention_maps")) or trainer.state.fn != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokens = data.eval_dataset("val")[0][0].flatten(0, -2)[:1, :MOST_POSITIONS].to(pl_module.device)  # (1, T)
        with trainer.precision_plugin.forward_context():
            maps = net.attention_maps(tokens)  # one (1, H, T, T) a block
        names = [_symbol(self._labels[i]) if i < len(self._labels) else str(i) for i in tokens[0].tolist()]
        for i, weights in enumerate(maps):
            picture = pictures.attention(weights[0], names)
            for board in self._boards:
                board.add_image(f"attention/block_{i}", picture, trainer.global_step, dataformats="HWC")

    @harmless
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the token embedding into the projector, each row under its token."""
        net: Any = pl_module.net
        tables = [m.weight for m in net.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == net.vocab_size]
        if not (self._loggers and self.embedding and tables):
            return
        rows = tables[0].detach().float().cpu()[:MOST_ROWS]  # (V, C)
        for board in self._boards:
            if (Path(board.log_dir) / f"{trainer.global_step:05d}").exists():
                continue  # a finished run was started again; the writer would complain on standard output
            board.add_embedding(rows, metadata=self._labels, global_step=trainer.global_step, tag="embedding")


def _symbol(label: str) -> str:
    """Return a label without its quotes; a space as a dot, which can be seen."""
    return label[1:-1].replace(" ", "·")


def _histogram(board: Any, tag: str, values: Tensor, step: int) -> None:
    values = values.float()
    finite = values[torch.isfinite(values)].clamp(-1e19, 1e19)  # beyond 1e20 the writer has no bins and raises
    if finite.numel() > 1:
        board.add_histogram(tag, finite.cpu(), step)
