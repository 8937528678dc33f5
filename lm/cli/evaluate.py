"""`lm validate` and `lm test`: evaluate a checkpoint on the whole of a split."""

import math
import sys
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lm.checkpoints import checkpoint, schema
from lm.cli import common, parsing
from lm.errors import CheckError, UserError
from lm.tokenizers import from_state
from lm.training.checkpoint_io import AtomicCheckpointIO, restored
from lm.training.evaluation import COUNTS
from lm.training.metrics import shown


class Evaluate(parsing.Recipes):
    """Parses a recipe whose defaults are the checkpoint's own.

    Args:
        arguments: The words of the command line after the command.
        split: Which split is the default.
    """

    classes = ()  # the checkpoint names them

    def __init__(self, arguments: list[str], split: str) -> None:
        self.split, self.command = split, "test" if split == "test" else "validate"
        path = parsing.option(arguments, "--ckpt_path")
        if path is None and not any(word.startswith("--help") for word in arguments):
            raise UserError("--ckpt_path is missing: say which checkpoint to evaluate")
        self.path = Path(path or "")
        self.saved = checkpoint.peek(checkpoint.verify(self.path)) if path else None
        super().__init__(arguments, "Evaluate a checkpoint on the whole of a split, once.")

    def before_instantiate_classes(self) -> None:
        """Refuse what only training chooses."""
        if self.config.trainer.precision == "auto":
            raise UserError("trainer.precision auto: lm fit alone chooses: say 32-true or bf16-mixed")
        super().before_instantiate_classes()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what only evaluation needs, and make the checkpoint's recipe the default."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str, help="The checkpoint.")
        parser.add_argument(
            "--split", type=Literal["val", "test", "train"], default=self.split, help="What to evaluate on."
        )
        if self.saved is not None:
            with checkpoint.of_lm(self.path):
                recipe: Any = self.saved.config
                parser.set_defaults({"model": recipe["model"], "data": recipe["data"]})
                parser.set_defaults({"trainer.precision": recipe["trainer"]["precision"], "name": recipe["name"]})
        parser.set_defaults({"trainer.devices": 1, "trainer.logger": False, "trainer.enable_checkpointing": False})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer without the recipe's settings for checkpoints and samples."""
        settings = {**self.config_init.trainer, **kwargs}
        self.files = AtomicCheckpointIO(Path(self.config.ckpt_path))
        trainer = self._instantiate_trainer(settings | {"plugins": [self.files]}, [self.config_init.watch])
        self.config_init.watch.attach(trainer)
        return trainer

    def run(self) -> dict[str, Any]:
        """Evaluate, and return what `--json` prints."""
        assert self.saved is not None
        data: Any = self.datamodule
        with checkpoint.of_lm(self.path):
            data.tokenizer = from_state(self.saved.tokenizer)  # ids mean what they meant in training
        data.val_split = self.config.split
        module = parsing.language_model(self.model)
        module.config, module.resumes = self.resolved(), True
        if self.trainer.is_global_zero and self.config.split == "test" and not getattr(data, "test_fraction", 1):
            print("note: no test split (data.test_fraction is 0): the validation split is evaluated", file=sys.stderr)
        with restored(self.files):
            self.config_init.watch.over(
                self.trainer,
                lambda: self.trainer.validate(
                    module, datamodule=data, ckpt_path=self.config.ckpt_path, verbose=False, weights_only=True
                ),
            )
        values = {name: value for name, value in module.validation.items() if name != "step"}
        if not math.isfinite(values["loss"]):
            assert module.net is not None
            culprit = schema.not_finite(module.net.state_dict())
            why = f"{culprit} is not finite" if culprit else "its network computes what is not finite"
            raise CheckError(
                f"checkpoint {self.config.ckpt_path}: the loss is {values['loss']}: {why}, training had diverged: use "
                "an earlier checkpoint"
            )
        return values | {"step": self.saved.step}


def validate(arguments: list[str]) -> None:
    """Run `lm validate`."""
    _evaluate(arguments, "val")


def test(arguments: list[str]) -> None:
    """Run `lm test`."""
    _evaluate(arguments, "test")


def _evaluate(arguments: list[str], split: str) -> None:
    parsing.quiet()
    cli = Evaluate(arguments, split)
    result = cli.run()
    if not cli.trainer.is_global_zero:
        return
    if cli.config.json:
        common.print_json(result)
    else:
        over = next(f"over {result[name]:,} {name}" for name in COUNTS if name in result)
        values = ", ".join([f"loss {result['loss']:.4f}", *shown(result), over])
        print(f"{cli.config.split} at step {result['step']}: {values}")
