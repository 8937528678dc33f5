"""Text samples that a run writes while it trains."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lm.bounds import checked
from lm.errors import UserError, setting
from lm.generation.sampling import Sampler, TextStream, generate, start_tokens
from lm.training.distributed.sharding import is_sharded
from lm.training.harmless import harmless


class SampleText(Callback):
    """Writes a text sample to TensorBoard at every validation, where the network writes text.

    Args:
        max_new_tokens: Its length; 0 switches samples off.
        prompt: What it continues.
        temperature: Sampling temperature.
        seed: Sampling seed; each sample draws the same random numbers, so that samples differ by the weights alone.
    """

    @checked("samples.", UserError)
    def __init__(
        self, *, max_new_tokens: int = 200, prompt: str = "", temperature: float = 0.8, seed: int = 1337
    ) -> None:
        self.max_new_tokens, self.prompt, self.seed = max_new_tokens, prompt, seed
        self.sampler = Sampler(temperature=temperature)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the prompt and the seed before training, rather than at its first evaluation."""
        module: Any = pl_module
        self._generator()
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):  # command-line bytes that are not UTF-8
            raise UserError(f"samples.prompt {self.prompt!r}: it is no UTF-8 text")
        try:
            start_tokens(module.tokenizer, self.prompt)
        except UserError as error:
            raise UserError(f"{setting('samples.prompt')}: {error.text}") from error

    @harmless
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample and write."""
        module: Any = pl_module
        if not self.max_new_tokens or trainer.sanity_checking or trainer.state.fn != "fit" or not module.writes:
            return
        alone = not is_sharded(trainer)  # or all ranks must compute
        if alone and not (trainer.is_global_zero and boards(trainer)):
            return
        prompt = torch.tensor([start_tokens(module.tokenizer, self.prompt)], device=module.device)  # (1, T)
        stream = TextStream(module.tokenizer, [])
        tokens = generate(module.net, prompt, sampler=self.sampler, generator=self._generator())
        eager = torch.compiler.set_stance("force_eager")  # a graph for each length would take minutes
        with trainer.precision_plugin.forward_context(), eager:
            text = self.prompt
            for _ in range(self.max_new_tokens):
                text += stream.add(int(next(tokens)))
                if stream.done:
                    break
        write_text(trainer, "sample", text + stream.finish(), trainer.global_step)

    def _generator(self) -> torch.Generator:
        try:
            return torch.Generator().manual_seed(self.seed)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise UserError(f"samples.seed is {self.seed}: it must fit into 64 bits") from error


def boards(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the loggers that show text."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def write_text(trainer: Trainer, name: str, text: str, step: int) -> None:
    """Write a text to TensorBoard, by one process; indented by four, which Markdown shows verbatim."""
    for board in boards(trainer) if trainer.is_global_zero else []:
        board.experiment.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)
