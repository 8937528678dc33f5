"""What all commands parse alike: recipes by LightningCLI, options by jsonargparse, errors in one line."""

import difflib
import json
import logging
import math
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lm.errors import UserError
from lm.inference.callbacks import SampleText
from lm.training import LanguageModel
from lm.training.callbacks import Checkpoints
from lm.training.figures import Figures

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # a run's length is said in steps
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
        ".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def output(as_json: bool) -> IO[str]:
    """Return where progress goes: standard error where the last line of standard output is to be JSON."""
    return sys.stderr if as_json else sys.stdout


def print_json(values: dict[str, Any]) -> None:
    """Print a result as one line of JSON, which has no NaN or infinity: they become null."""
    print(json.dumps(finite(values), allow_nan=False), flush=True)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with null for what JSON has no word for."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


class Recipes(LightningCLI):
    """LightningCLI over a recipe: YAML files, dotted overrides, --print_config.

    The sections are trainer, model, data, checkpoint and samples; a command takes those that concern it.

    Args:
        arguments: The words of the command line after the command.
        description: What `--help` says first.
    """

    classes: tuple[str, ...] = ("--model=lm.training.LanguageModel", "--data=lm.data.TextData")
    """What is trained where no recipe says it."""

    def __init__(self, arguments: list[str], description: str) -> None:
        from lightning.pytorch import LightningDataModule, LightningModule

        if not any(word.split("=")[0] in ("--config", "-c") for word in arguments):
            # not parser defaults: those would leave their values behind where a recipe names another class
            arguments = [*self.classes, *arguments]
        argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns where both are there
        try:
            with one_line_errors(lambda: self.parser):
                super().__init__(
                    model_class=LightningModule,
                    datamodule_class=LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    save_config_callback=None,
                    trainer_defaults=TRAINER_DEFAULTS,
                    seed_everything_default=1337,
                    parser_kwargs={"description": description, "exit_on_error": False, "allow_abbrev": False},
                    args=arguments,
                    run=False,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                )
        finally:
            sys.argv = argv

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Say the recipe's own defaults, name and seed."""
        parser.add_argument("--name", type=str | None, default=None, help="The run's name, else the config file's.")
        parser.add_argument("--json", action="store_true", help="Print the result as JSON; progress goes to stderr.")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(SampleText, "samples")
        parser.add_lightning_class_args(Figures, "figures")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_seed)

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain values, defaults filled in, without what concerns this command alone."""
        text = self.parser.dump(self.config, skip_link_targets=True, skip_unset=False, format="yaml")
        values = yaml.safe_load(text)
        return {
            key: value
            for key, value in values.items()
            if key not in ("config", "ckpt_path", "init_from", "json", "split")
        }


def _seed(value: int | bool) -> int:
    if isinstance(value, bool):
        raise UserError(f"seed_everything is {value}: say a number, so that the run can be repeated")
    return value


@contextmanager
def one_line_errors(parser: Any) -> Iterator[None]:
    """Turn what jsonargparse raises into a UserError that names the key, what was found, and the nearest known name.

    Args:
        parser: Returns the parser, once it is there.
    """
    try:
        yield
    except UserError:
        raise
    except MisconfigurationException as error:  # what Lightning's Trainer refuses
        raise UserError(str(error)) from error
    except (ArgumentError, TypeError, ValueError, KeyError, ImportError, AttributeError) as error:
        if cause := _cause(error):
            raise cause from error
        if not isinstance(error, ArgumentError) and os.environ.get("LM_DEBUG"):
            raise
        raise UserError(explain(str(getattr(error, "message", None) or error), known_names(parser()))) from error


@contextmanager
def trainer_errors(ckpt_path: Path | None) -> Iterator[None]:
    """Turn what the Trainer refuses when it starts into a UserError."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ValueError as error:  # torch's, from Optimizer.load_state_dict, or a network's own
        if str(error).startswith("BatchNorm in training mode"):
            raise UserError(f"data.batch_size: {error}") from error
        if ckpt_path is None or "loaded state dict" not in str(error):
            raise
        raise UserError(f"checkpoint {ckpt_path}: its optimizer is another one than the recipe's: {error}") from error


def _cause(error: BaseException | None) -> UserError | None:
    """Return the UserError among an error's causes: one that a constructor raised while it was being parsed."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def known_names(parser: ArgumentParser) -> list[str]:
    """Return the options that a parser knows, and the settings of the classes that its recipes are made of."""
    from inspect import signature

    from lm import data, models, training
    from lm.training import schedules

    names = {action.dest for action in parser._actions}
    classes = [getattr(module, name) for module in (data, models, training) for name in module.__all__]
    classes += schedules.Schedule.__subclasses__()
    for part in (*classes, torch.optim.AdamW):
        names |= {part.__name__, *signature(part).parameters}
    return sorted(names)


UNKNOWN = (  # how jsonargparse says that a name is not known
    r"[Kk]ey ['\"]([\w.]+)['\"] is not expected",
    r"[Uu]nrecognized arguments: --([\w.]+)",
    r"[Oo]ption ['\"]([\w.]+)['\"] is not",
    r"No action for key ['\"]([\w.]+)['\"]",
    r"does not accept nested key ['\"]([\w.]+)['\"]",
)


def explain(message: str, names: list[str]) -> str:
    """Return one line for a parser's message.

    Args:
        message: What jsonargparse says, possibly over many lines; of nested problems the innermost counts.
        names: Known option and key names, for suggestions.
    """
    text = " ".join(message.split())
    for pattern in UNKNOWN:
        if found := re.findall(pattern, text):
            return f"unknown option or key {found[0]}{suggestion(found[0], names)}"
    if missing := re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return f"class_path {'.'.join(missing[0])}: no such class{suggestion(missing[0][1], names)}"
    if missing := re.findall(r"No module named '([\w.]+)'", text):
        return f"class_path: there is no module {missing[0]} to import"
    if file := re.findall(r"File does not exist: '?([^']+)'?", text):
        return f"{file[-1]}: no such file"
    if empty := re.findall(r"(?:Problems parsing config|Unable to (?:load|parse)[^:]*): (.*)", text):
        return f"the config is no YAML mapping: {empty[0][:300]}"
    if "Unexpected config:" in text:
        return "the config is empty or no YAML mapping: see configs/quickstart.yaml"
    if re.search(r"init_args=Namespace\(net=None", text):
        return "no network is said: give a recipe, --config configs/quickstart.yaml, or --model.init_args.net CLASS"
    value = re.search(r"(?:Got|Given) value: (.+?)\.?(?= Given | Got value| - |$)", text)
    if value and (keys := re.findall(r"Parser key \"([\w.]+)\"", text)):
        kinds = re.findall(r"Expected an? <(?:class|enum) '([\w.]+)'>", text)
        kinds += [choice for choices in re.findall(r"Literal\[(.+?)\]", text) for choice in choices.split(", ")]
        expected = " or ".join(dict.fromkeys(kind for kind in kinds if kind not in ("NoneType", "dict", "Namespace")))
        return f"{keys[-1]}: found {value[1]!r}, expected {expected or 'another type'}: see --help"
    return text if len(text) < 600 else text[:600] + " …"


def suggestion(found: str, names: list[str]) -> str:
    """Return a hint at the known name that is nearest to a wrong one."""
    last = found.split(".")[-1]
    near = difflib.get_close_matches(found, names, n=1) or difflib.get_close_matches(
        last, [name.split(".")[-1] for name in names], n=1
    )
    return f": did you mean {near[0]}?" if near else ": see --help"


def run_name(config: Namespace) -> str:
    """Return the run's name: said, or the config's file name.

    Raises:
        UserError: It is no name of a folder.
    """
    files = [str(path) for path in config.get("config") or [] if path]
    name = config.name or (Path(files[-1]).stem if files else "run")
    if not re.fullmatch(r"[\w][\w.=+-]*", name):
        raise UserError(f"--name {name}: use letters, digits, '.', '_', '-', '+' and '='")
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
