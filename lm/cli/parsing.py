"""What all commands parse alike: recipes by LightningCLI, options by jsonargparse, errors in one line."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lm.checkpoints import imports
from lm.checkpoints.restore import deny_what_runs_code
from lm.checkpoints.schema import Saved
from lm.cli import common, environment, help, messages, plain_help, values
from lm.errors import UserError, causes
from lm.tokenizers import CharTokenizer, from_state
from lm.training import LanguageModel
from lm.training.callbacks.checkpointing import Checkpoints
from lm.training.callbacks.figures import Figures
from lm.training.callbacks.samples import SampleText
from lm.training.distributed.watch import Watch

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # a run's length is given in steps
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # our loaders divide the data themselves, each token once
    "enable_progress_bar": False,  # Console is shown instead: 0.3 ms a step cheaper, quiet in logs
    "enable_model_summary": False,
}


def quiet() -> None:
    """Silence what Lightning and torch say that a user of `lm` can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*",
        ".*treespec.*",
        ".*_pytree.*",
        ".*`isinstance\\(treespec.*",
        ".*It is recommended to use .self.log.*sync_dist.*",  # our metric has summed over the ranks already
        ".*fp16 is not supported on CPU.*",  # lm refuses it in one line
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*you need to define a `flops_per_batch` attribute.*",  # throughput is measured without it
    ):
        warnings.filterwarnings("ignore", message=message)


class Recipes(LightningCLI):
    """LightningCLI over a recipe: YAML files, dotted overrides, --print_config.

    The sections are trainer, model, data, checkpoint and samples; a command takes those that concern it.

    Args:
        arguments: The words of the command line after the command.
        description: What `--help` says first.
    """

    classes: tuple[str, ...] = ("--model=lm.training.LanguageModel", "--data=lm.data.TextData")
    """What is trained where no recipe says otherwise."""

    command = "fit"

    def __init__(self, arguments: list[str], description: str) -> None:
        from lightning.pytorch import LightningDataModule, LightningModule

        if not any(word.split("=")[0] in ("--config", "-c") for word in arguments):
            # not parser defaults: those would leave their values behind where a recipe names another class
            arguments = [*self.classes, *arguments]
        deny_what_runs_code()
        environment.check()
        values.prepare(arguments)
        argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns if it gets both
        try:
            with common.one_line_errors(lambda: self.parser, arguments, recipe_names), trainer_errors(None):
                super().__init__(
                    model_class=LightningModule,
                    datamodule_class=LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    save_config_callback=None,
                    trainer_defaults=TRAINER_DEFAULTS,
                    seed_everything_default=1337,
                    parser_kwargs={
                        "prog": f"lm {self.command}",
                        "description": description,
                        "exit_on_error": False,
                        "allow_abbrev": False,
                    },
                    parser_class=_Parser,
                    args=arguments,
                    run=False,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                )
        finally:
            sys.argv = argv

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check all numbers against their bounds; or print the requested help, and stop."""
        if asked := [word.removeprefix("--help.") for word in args if word.startswith("--help.")]:
            print(section_help(parser, asked[0], args), end="")
            raise SystemExit(0)
        super().parse_arguments(parser, args)
        values.check(self.config)
        for one in messages.said(args):
            if one.key in ("data.seed", "data.init_args.seed") and one.value != str(self.config.seed_everything):
                raise UserError(f"{one} is {str(one.value)[:40]}: data follow seed_everything: say that alone")
        check_devices(self.config.get("trainer"))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name, lm's own sections and the seed."""
        parser.add_argument("--name", type=str | None, default=None, help="The run's name, else the config file's.")
        parser.add_argument("--json", action="store_true", help="Print the result as JSON; progress goes to stderr.")
        (precision,) = (one for one in parser._actions if one.dest == "trainer.precision")
        precision._typehint |= Literal["auto"]  # type: ignore[attr-defined]
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(SampleText, "samples")
        parser.add_lightning_class_args(Figures, "figures")
        parser.add_lightning_class_args(Watch, "watch")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)

    def instantiate_classes(self) -> None:
        """Make the recipe's parts, and check that lm can train the module on the data."""
        super().instantiate_classes()
        language_model(self.model)
        if not all(hasattr(type(self.datamodule), name) for name in ("vocab_size", "text_tokenizer", "divided")):
            raise UserError(
                f"data {type(self.datamodule).__name__}: it is not an lm.data.TokenData, which gives tokens"
            )

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain values, defaults filled in, without settings of this command alone."""
        how = {"skip_link_targets": True, "skip_unset": False, "skip_validation": True}  # it was validated when read
        text = self.parser.dump(self.config, format="yaml", **how)
        return {
            key: value
            for key, value in yaml.safe_load(text).items()
            if key not in ("config", "ckpt_path", "init_from", "json", "split", "rules", "plot")
        }


class FromWeights(Recipes):
    """Parses a recipe that may begin with a checkpoint's weights, and leave its network and tokenizer to that."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--init_from",
            type=Path | None,
            default=None,
            help="A checkpoint, or a folder of Hugging Face's transformers, whose weights a new run begins with; what "
            "it has of each symbol goes over, a symbol that it lacks begins untrained.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a recipe that names no network has the checkpoint's."""
        said = {one.key: one.value for one in messages.said(args)}
        path, net = said.get("init_from"), "model.init_args.net"
        self.origin = None
        if path not in (None, "null"):  # what is wrong with it is found before anything costs time
            self.origin = replace(imports.peek(Path(path), "init_from"), state={})
        if self.origin and self.origin.config and said.get(net) is None and f"{net}.class_path" not in said:
            settings = {"class_path": "lm.training.LanguageModel", "init_args": {"net": self.origin.net}}
            parser.set_defaults({"model": settings})
        super().parse_arguments(parser, args)

    def inherit_tokenizer(self, saved: Saved | None) -> None:
        """Give the data the tokenizer of a checkpoint where the recipe says `inherit`.

        Raises:
            UserError: It says so, and there is none.
        """
        data: Any = self.datamodule
        if getattr(data, "tokenizer", None) != "inherit":
            return
        if saved is None:
            raise UserError(
                "data.tokenizer inherit takes the tokenizer of a checkpoint: say which with --init_from, or a tokenizer"
            )
        data.tokenizer = from_state(saved.tokenizer)
        if isinstance(data.tokenizer, CharTokenizer):
            data.tokenizer.advice = "say data.tokenizer char in place of inherit, which adds them as untrained ones"


class Untrained(FromWeights):
    """Parses a recipe that is inspected, not trained: without a Trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make no trainer."""
        return None  # type: ignore[return-value]

    def set_up_data(self) -> None:
        """Read and tokenize the data."""
        self.inherit_tokenizer(self.origin)
        self.datamodule.setup("fit")


class _Parser(LightningArgumentParser):
    """Explains types in words, and writes enum settings, as of Lightning's Timer, as the strings of a recipe."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, formatter_class=plain_help.PlainHelp, **settings)

    def dump(self, cfg: Namespace, *args: Any, **settings: Any) -> str:
        """Return a recipe as text."""
        text: str = super().dump(_without_enums(cfg), *args, **settings)
        return text


def _without_enums(value: Any) -> Any:
    if isinstance(value, Namespace):
        return Namespace(**{key: _without_enums(one) for key, one in vars(value).items()})
    if isinstance(value, dict):
        return {key: _without_enums(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_enums(one) for one in value]
    return value.value if isinstance(value, Enum) and isinstance(value, str) else value


def _seed(value: int | bool) -> int:
    if isinstance(value, bool):
        raise UserError(f"seed_everything is {value}: say a number, so that the run can be repeated")
    return value


def check_devices(trainer: Any) -> None:
    """Refuse an invalid number of processes: Lightning's own error does not show it.

    Args:
        trainer: The Trainer's arguments; None where there is no Trainer.
    """
    found = getattr(trainer, "devices", "auto")
    text = ",".join(map(str, found)) if isinstance(found, list) else str(found).strip()
    accelerator = getattr(trainer, "accelerator", None)
    cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    known = r"auto|[1-9]\d*" if cpu else r"auto|-1|[1-9]\d*|\d+(\s*,\s*\d+)*,?"
    if not re.fullmatch(known, text):
        few = "1 or more, or auto" if cpu else "1 or more, -1 or auto for all, or 0,1 for which"
        raise UserError(f"trainer.devices: found {messages.shortened(repr(found), 60)}: say how many processes: {few}")


def section_help(parser: LightningArgumentParser, section: str, words: list[str]) -> str:
    """Return what `--help.SECTION` prints: all options of a section, and of the classes that the words name.

    Raises:
        UserError: There is no such section.
    """
    if section == "all":
        return parser.format_help()
    if section not in help.SECTIONS:
        raise UserError(f"--help.{section}: say --help.all, or --help. and one of {', '.join(help.SECTIONS)}")
    if section not in ("model", "data"):
        parts = re.findall(rf"^  --{section}\.(?!\S+\.help).*\n(?:    .*\n)*", parser.format_help(), flags=re.MULTILINE)
        return f"{help.SECTIONS[section]}\n{''.join(parts)}"
    kind = option(words, f"--{section}") or {"model": "lm.training.LanguageModel", "data": "lm.data.TextData"}[section]
    with redirect_stdout(StringIO()) as shown, suppress(SystemExit):
        parser.parse_args([f"--{section}.help={kind}"])
    text = re.sub(r",\s+known\s+subclasses:[^)]*", "", shown.getvalue())  # all of torch.nn
    return text[text.index("Help for") :]


def recipe_names(said: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the full names of the settings of the classes that a recipe is made of, and what classes there are.

    Args:
        said: All that the recipe and the command line say: only classes in it count, where there are any.
    """
    from inspect import signature

    from lightning.pytorch import callbacks, loggers

    from lm import data, models, posttraining, training
    from lm.training import optimizers, schedules

    init = "model.init_args."
    places = {
        "model": [getattr(place, name) for place in (training, posttraining) for name in place.__all__],
        f"{init}net": [getattr(models, name) for name in models.__all__],
        f"{init}optimizer": [torch.optim.AdamW, torch.optim.SGD, optimizers.MuonAdamW, optimizers.ScaledAdamW],
        f"{init}schedule": schedules.Schedule.__subclasses__(),
        "data": [getattr(data, name) for name in data.__all__],
        "trainer.callbacks": [getattr(callbacks, name) for name in callbacks.__all__],
        "trainer.logger": [getattr(loggers, name) for name in loggers.__all__],
    }
    names = [place for place in places if place.startswith(init)]
    for place, classes in places.items():
        mentioned = [one for one in classes if re.search(rf"\b{one.__name__}\b", said)]
        given = {"net": ("vocab_size", "block_size"), "optimizer": ("params",), "data": ("seed",)}
        for one in mentioned or ([] if place.startswith("trainer.") else classes):
            own = [name for name in signature(one).parameters if name not in given.get(place.split(".")[-1], ())]
            names += [f"{place}.init_args.{name}" for name in own]
    return names, {place: [_import_path(one) for one in classes] for place, classes in places.items()}


def _import_path(kind: type) -> str:
    """Return the shortest path that a class can be imported by: lm.models.GPT, not lm.models.gpt.GPT."""
    parts = kind.__module__.split(".")
    for i in range(1, len(parts)):
        if getattr(sys.modules[".".join(parts[:i])], kind.__name__, None) is kind:
            return f"{'.'.join(parts[:i])}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__name__}"


@contextmanager
def trainer_errors(ckpt_path: Path | None) -> Iterator[None]:
    """Turn what the Trainer refuses when it starts into a UserError."""
    try:
        yield
    except MisconfigurationException as error:
        if absent := re.search(r"`(\w+)Accelerator` can not run on your system", str(error)):
            raise UserError(
                f"trainer.accelerator {absent[1].lower()}: there is none that torch can use: see lm doctor; say "
                "--trainer.accelerator cpu, or let a container have it (docker run --gpus all)"
            ) from error
        raise UserError(messages.explain(str(error), (), ())) from error
    except ModuleNotFoundError as error:
        if not (package := re.search(r"Requirement '(\w+)", str(error))):
            raise
        raise UserError(f"trainer: {str(error).partition(' Requirement')[0]}: pip install {package[1]}") from error
    except RuntimeError as error:
        if str(error).startswith("You set `--ntasks"):
            raise UserError(f"SLURM_NTASKS: {error}") from error
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"trainer.callbacks: {error}") from error
        raise
    except ValueError as error:  # torch's, from Optimizer.load_state_dict, or a network's own
        for cause in causes(error):  # jsonargparse's, around what a class of Lightning says of its arguments
            if isinstance(cause, MisconfigurationException):
                raise UserError(f"trainer: {cause}") from error
        if str(error).startswith("BatchNorm in training mode"):
            raise UserError(f"data.batch_size: {error}") from error
        if str(error).startswith("You set `"):  # SLURM's variables say otherwise
            raise UserError(f"trainer.devices or trainer.num_nodes: {error}") from error
        if ckpt_path is None or "loaded state dict" not in str(error):
            raise
        raise UserError(f"checkpoint {ckpt_path}: its optimizer is another one than the recipe's: {error}") from error


def run_name(config: Namespace) -> str:
    """Return the run's name: said, or the config's file name.

    Raises:
        UserError: It cannot be a folder's name.
    """
    files = [str(path) for path in config.get("config") or [] if path]
    name = config.name or (Path(files[-1]).stem if files else "run")
    if not re.fullmatch(r"[\w][\w.=+-]*", name):
        raise UserError(f"--name {name}: use letters, digits, '.', '_', '-', '+' and '='")
    if len(name.encode()) > 200:  # file systems take 255, and files beside it have longer names
        raise UserError(f"--name {messages.shortened(name, 60)}: it has {len(name.encode())} bytes: say at most 200")
    return name


def language_model(module: Any) -> LanguageModel:
    """Return the module, checked to be one that `lm` can train.

    Raises:
        UserError: It is another LightningModule.
    """
    if not isinstance(module, LanguageModel):
        raise UserError(f"model {type(module).__name__}: it is not an lm.training.LanguageModel")
    return module


def option(arguments: list[str], name: str) -> str | None:
    """Return the value of an option that must be known before the parser can be made; None where it is not said."""
    value = None
    for i, word in enumerate(arguments):
        if word == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value
