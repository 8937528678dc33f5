"""`lm fit`: train a network."""

import itertools
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy

from lm import log, storage
from lm.checkpoints import checkpoint, disk, runs, sharded
from lm.cli import common, devices, environment, parsing, rules, streams
from lm.data.module import TokenData
from lm.errors import CommandError, Stopped, UserError
from lm.experiments.about import About
from lm.experiments.trial import Reports
from lm.training import ManualLanguageModel, auto, compute, harmless, lightning_internals
from lm.training.callbacks import lightning
from lm.training.callbacks.checkpointing import Checkpoints
from lm.training.callbacks.process import Console, FrozenHeap, KeptMemory, OwnCores, RandomState
from lm.training.callbacks.signals import StopSignals
from lm.training.checkpoint_io import AtomicCheckpointIO, restored
from lm.training.distributed.sharding import Sharded
from lm.training.loggers import curve, log_files
from lm.training.loggers.events import Events
from lm.training.loggers.removed import Removed
from lm.training.manual import check_precision


class Fit(rules.WithRules):
    """Parses a recipe and makes its parts, with the run's checkpoints, logs and signals attached."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where to start from."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="last continues the run, auto continues or starts it, a path starts from that checkpoint.",
        )
        parser.add_argument("--plot", action="store_true", help="Draw the losses in the terminal at the end.")

    def before_instantiate_classes(self) -> None:
        """Find the run's folders and the checkpoint to start from, before anything costs time."""
        super().before_instantiate_classes()
        config = self.config
        name = parsing.run_name(config)
        root = Path(config.trainer.default_root_dir or "")
        self.checkpoints, self.logs, self.name = root / "checkpoints" / name, root / "logs" / name, name
        self.stream: Any = common.output(config.json)
        log.take_over(name)
        limits = config.trainer
        lightning.refuse_settings(limits)
        if limits.max_epochs not in (-1, None):
            raise UserError(f"trainer.max_epochs is {limits.max_epochs}: training has no epochs, say trainer.max_steps")
        if limits.min_steps is not None and limits.min_steps > limits.max_steps:
            raise UserError(
                f"trainer.min_steps {limits.min_steps} is above trainer.max_steps {limits.max_steps}: change one"
            )
        if limits.max_steps < 1 and not limits.fast_dev_run:
            raise UserError(f"trainer.max_steps is {limits.max_steps}: say how many steps to train")
        if limits.limit_train_batches not in (None, 1.0):
            raise UserError("trainer.limit_train_batches: training has no epochs to limit, say trainer.max_steps")
        if log.rank() == 0 and sharded.unfinished(self.checkpoints):
            with self.alone():
                sharded.recover(self.checkpoints)
        found = checkpoint.newest_first(self.checkpoints)
        self.start = 1 + max((saved.start for saved in found.values()), default=0)
        self.ckpt_path = runs.resolve(
            self.checkpoints, found, config.ckpt_path, note=lambda text: self.say(f"note: {text}", level="warning")
        )
        self.goes_on = (found.get(self.ckpt_path) or checkpoint.peek(self.ckpt_path)) if self.ckpt_path else None
        self.first_step = self.goes_on.step if self.goes_on else 0

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes out of the run."""
        refusal = f"{self.checkpoints}: another lm fit is at work in it: wait for it, or say another --name"
        return storage.alone(self.checkpoints / ".lock", refusal)

    def say(self, text: str, **fields: Any) -> None:
        """Print a line about the run."""
        print(log.line(text, run=self.name, **fields), file=self.stream, flush=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer, with our loggers unless the recipe has its own, our checkpoint files and callbacks."""
        settings = {**self.config_init.trainer, **kwargs}
        self._choose(settings)
        lightning.take_over(settings, self.checkpoints)
        self._count_in_batches(settings)
        if isinstance(self.config_init.model, ManualLanguageModel):
            check_precision(settings["precision"])
        if settings["logger"] in (None, True):
            settings["logger"] = self._loggers()
        if settings["strategy"] == "fsdp2":
            settings["strategy"] = Sharded()
        elif str(settings["strategy"]).startswith("fsdp"):
            raise UserError(f"trainer.strategy {settings['strategy']}: sharding is by FSDP2 here: use fsdp2")
        elif any(kind in str(settings["strategy"]) for kind in ("spawn", "fork", "notebook")):
            raise UserError(f"trainer.strategy {settings['strategy']}: each rank is a program of its own here: use ddp")
        if settings["sync_batchnorm"]:
            raise UserError("trainer.sync_batchnorm: each rank normalises by its own batch here: set it to false")
        self.files = AtomicCheckpointIO(self.ckpt_path)
        settings["plugins"] = [*_listed(settings["plugins"]), self.files]
        settings["default_root_dir"] = str(self.logs)  # where Lightning's own parts write
        keeper: Checkpoints = self.config_init.checkpoint
        keeper.folder, keeper.start = self.checkpoints, self.start
        callbacks = [
            _Opening(self),
            About(self.logs),
            RandomState(self.config_init.seed_everything),
            Console(self.stream, self.name, bar=not settings["enable_progress_bar"]),
            self.config_init.samples,
            self.config_init.figures,
            self.config_init.watch,
            StopSignals(lambda: getattr(self.stream, "unread", False)),
            FrozenHeap(),
            KeptMemory(),
            OwnCores(),
            lightning.Endings(self.say),
        ]
        callbacks += Reports.wanted()
        if not settings["fast_dev_run"]:
            callbacks.append(keeper)
        trainer = self._instantiate_trainer(settings, callbacks)
        lightning.mend(trainer, self.say)
        for logger in trainer.loggers:
            harmless.guard(logger)
        lightning_internals.begin_and_end_always(trainer)
        self.config_init.watch.attach(trainer)
        # Lightning reads SLURM's variables only when it starts several processes: four tasks would be four runs
        with parsing.trainer_errors(None):
            lightning_internals.check_environment(trainer)
        if trainer.strategy.root_device.type == "cpu" and str(settings["precision"]) in ("16-mixed", "16", "16-true"):
            raise UserError(  # Lightning would silently use bf16-mixed instead
                f"trainer.precision {settings['precision']} is for GPUs, and this is a CPU: use bf16-mixed or 32-true"
            )
        if isinstance(trainer.strategy, DDPStrategy):
            compute.tune(trainer.strategy)
        return trainer

    def _loggers(self) -> list[Any]:
        removed = Removed()
        events = Events(self.logs, self.first_step, opened=False, removed=removed)
        return [events, log_files.MetricsCSV(self.logs, removed), log_files.MetricsProm(self.logs, removed)]

    def _choose(self, settings: dict[str, Any]) -> None:
        """Put the checkpoint's settings, or else the faster ones, in the place of "auto", and say so."""
        module = parsing.language_model(self.model)
        wanted = {"trainer.precision": settings["precision"], "model.compile": getattr(module, "compiled", False)}
        wanted = {name: value for name, value in wanted.items() if value == auto.AUTO}
        if not wanted:
            return
        saved = self.goes_on and self.goes_on.config
        if not saved and max(devices.processes(settings), environment.processes()) > 1:
            values = {"trainer.precision": "32-true or bf16-mixed", "model.compile": "true or false"}
            name = next(iter(wanted))
            raise UserError(f"{name} auto is measured in one process: say {values[name]}")
        if not saved:
            self.inherit_tokenizer(self.origin)
            self.datamodule.setup("fit")
        device = devices.of_recipe(settings)
        why = "as in the checkpoint"
        if "trainer.precision" in wanted:
            if saved:
                chosen = str(saved["trainer"]["precision"] or auto.FULL)
            else:
                chosen, why = auto.choose_precision(module, self.datamodule, device)
            settings["precision"] = self.config.trainer.precision = chosen
            self.say(f"note: trainer.precision auto: {chosen}: {why}")
        if "model.compile" in wanted:
            if saved:
                compiled = bool(saved["model"]["init_args"].get("compile"))
            else:
                compiled, why = auto.choose_compile(module, self.datamodule, device, str(settings["precision"]))
            module.compiled = self.config.model.init_args.compile = compiled
            self.say(f"note: model.compile auto: {str(compiled).lower()}: {why}")

    def _count_in_batches(self, settings: dict[str, Any]) -> None:
        """Turn val_check_interval from the recipe's steps into Lightning's batches.

        Nothing can be done inside a call that takes several steps, so calls are cut to the largest number of steps that
        divides all intervals.

        Raises:
            UserError: Intervals would cut a call, and the model would learn otherwise by shorter ones.
        """
        model = self.config_init.model
        steps = getattr(model, "steps_per_call", 1)
        intervals = {
            "trainer.val_check_interval": settings["val_check_interval"],
            "checkpoint.every_n_steps": self.config_init.checkpoint.every_n_steps,
        }
        cut = math.gcd(steps, *(one for one in intervals.values() if isinstance(one, int)))
        if cut < steps and getattr(model, "calls_matter", False):
            wrong = {name: one for name, one in intervals.items() if isinstance(one, int) and one % steps}
            raise UserError(
                f"model.steps_per_call {steps}: so many steps of {type(model).__name__} learn from one set of texts, "
                f"and {' and '.join(f'{name} {one}' for name, one in wrong.items())} would fall within: use multiples "
                f"of {steps}"
            )
        if cut < steps:
            self.say(
                f"note: model.steps_per_call {steps} is cut to {cut}: evaluations and checkpoints fall between calls"
            )
            model.steps_per_call = steps = cut
        if isinstance(settings["val_check_interval"], int):
            batches = settings["val_check_interval"] * settings["accumulate_grad_batches"]
            settings["val_check_interval"] = batches // steps

    def run(self) -> dict[str, Any]:
        """Train, and return what `--json` prints."""
        module = parsing.language_model(self.model)
        module.config, module.resumes = self.resolved(), self.ckpt_path is not None
        if self.config.init_from is not None and self.ckpt_path is None:
            module.init_from = self.config.init_from
        self.inherit_tokenizer(checkpoint.peek(self.ckpt_path) if self.ckpt_path else self.origin)
        if isinstance(self.datamodule, TokenData):  # checked before other processes start: one message
            self.datamodule.divided(self.trainer.world_size, self.trainer.accumulate_grad_batches)
        lock: AbstractContextManager[None] = nullcontext()
        made: AbstractContextManager[None] = nullcontext()
        if self.trainer.is_global_zero:
            made = disk.probed(self.checkpoints, self.logs)
            log_files.check(self.logs)
            lock = self.alone()
        began = time.monotonic()
        with made, lock, disk.full_disk_is_a_user_error(self.logs), parsing.trainer_errors(self.ckpt_path):
            if self.trainer.is_global_zero:
                runs.clear(self.checkpoints)
                if self.config.ckpt_path in ("last", "auto"):
                    runs.renew_last(self.checkpoints, self.ckpt_path)
            # send Lightning's bars and tables where ours go
            with redirect_stdout(self.stream), restored(self.files):
                self.config_init.watch.over(
                    self.trainer,
                    lambda: self.trainer.fit(
                        module, datamodule=self.datamodule, ckpt_path=self.ckpt_path, weights_only=True
                    ),
                )
        seconds = time.monotonic() - began
        metrics, step = module.metrics, self.trainer.global_step
        tokens = module.step_log.tokens_since_start(step)
        return {
            "step": step,
            "loss": metrics.get("loss"),
            "val_loss": module.validation.get("loss"),
            "seconds": round(seconds, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "ckpt_path": str(last) if (last := self.last_checkpoint()) else None,
        }

    def last_checkpoint(self) -> Path | None:
        """Return the newest checkpoint, last.ckpt unless a foreign file is in its place; None where none is kept."""
        if not any(isinstance(one, Checkpoints) for one in self.trainer.checkpoint_callbacks):
            return None
        return next(iter(checkpoint.newest_first(self.checkpoints)), None)

    def where_metrics_are(self) -> str:
        """Return where the loggers write, for the last line; nothing where there are none."""
        ours = any(isinstance(logger, log_files.MetricsCSV) for logger in self.trainer.loggers)
        places = [self.logs] if ours else [logger.log_dir or logger.save_dir for logger in self.trainer.loggers]
        named = ", ".join(dict.fromkeys(str(place) for place in places if place))
        return f"; metrics in {named}" if named else ""

    def open_logs(self, recipe: dict[str, Any]) -> None:
        """Drop log entries after the first step; write this start's recipe: config.yaml, then config-2.yaml, ..."""
        self.logs.mkdir(parents=True, exist_ok=True)
        if aside := log_files.forget(self.logs, self.first_step):
            self.say(f"note: {self.logs} has an earlier run's logs: they are kept in {aside}", level="warning")
        for logger in self.trainer.loggers:
            if isinstance(logger, Events):
                logger.opened = True
        number = 1 + len(list(self.logs.glob("config*.yaml")))
        names = itertools.chain(["config.yaml"] * (number == 1), (f"config-{k}.yaml" for k in itertools.count(number)))
        path = next(path for name in names if not os.path.lexists(path := self.logs / name))
        storage.write_whole(path, yaml.safe_dump(recipe, sort_keys=False).encode())


class _Opening(Callback):
    """Opens the run's logs only when training begins: a start that is refused must leave them alone."""

    def __init__(self, cli: Fit) -> None:
        self.cli = cli

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            config: Any = pl_module.config
            self.cli.open_logs(config)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.cli.files.restoring = None


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def fit(arguments: list[str]) -> None:
    """Run `lm fit`."""
    parsing.quiet()
    with streams.losable():  # losing a line of output must not stop training
        cli = Fit(arguments, "Train a network; writes checkpoints/RUN and logs/RUN.")
        try:
            with rules.blamed(cli.config.rules):
                result = cli.run()
        except Stopped as stop:
            raise _where_it_stopped(stop, cli) from None
        except CommandError as error:
            error.run = cli.name
            raise
        if cli.trainer.is_global_zero:
            _done(cli, result)


def _done(cli: Fit, result: dict[str, Any]) -> None:
    """Print the result; raise an error if standard output was lost during training."""
    if cli.config.json:
        common.print_json(result)
    else:
        saved = result["ckpt_path"] or "no checkpoint is kept"
        if cli.config.plot:
            rows = log_files.read_csv(cli.logs / "metrics.csv")[1]
            print(*curve.drawing(rows), sep="\n", file=cli.stream, flush=True)
        cli.say(f"done: step {result['step']}, {result['seconds']:.0f} s; {saved}{cli.where_metrics_are()}", **result)
    lost = sys.stdout.error  # type: ignore[union-attr]
    if isinstance(lost, BrokenPipeError):
        raise lost
    if lost is not None:
        raise UserError(f"standard output: {lost.strerror}; the run is finished")


def _where_it_stopped(stop: Stopped, cli: Fit) -> Stopped:
    """Return the stop's error, with the step it came after and what is saved."""
    stop.run = cli.name
    io: Any = cli.trainer.strategy.checkpoint_io
    io.writer.finish()  # a second signal may have come while it wrote
    if not cli.trainer.is_global_zero:
        stop.args = ("",)  # the first rank says it
        return stop
    last = cli.last_checkpoint()
    saved = f"{last} has step {checkpoint.peek(last).step}" if last else "nothing was saved"
    goes_on = ": continue with --ckpt_path auto" if last else ""
    stop.args = (f"{stop} after step {cli.trainer.global_step}; {saved}{goes_on}",)
    return stop
