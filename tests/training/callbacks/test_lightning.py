"""Lightning's callbacks and Trainer arguments: each row of docs/lightning.md, by a run of `lm fit`."""

import inspect
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.accelerators import CPUAccelerator

from lm.checkpoints import checkpoint
from lm.training.loggers.log_files import read_csv
from tests.conftest import ROOT
from tests.support.cases import often

Run = Callable[..., tuple[int, str, str]]

FAST = ["fit", "--config", "tiny.yaml", "--checkpoint.every_n_steps", 2, "--trainer.val_check_interval", 2]
FAST += ["--trainer.max_steps", 4, "--figures.every_n_steps", 0, "--samples.max_new_tokens", 0]
LAST = Path("checkpoints/tiny/last.ckpt")
WAYS = {
    "autograd": ["--model", "lm.training.LanguageModel"],
    "by hand": ["--model", "lm.training.ManualLanguageModel"],
    "two steps a call": ["--model.init_args.steps_per_call", 2],
}
OWN = """
import contextlib, os, signal
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from lm.training import schedules

def shout(trainer, pl_module):
    print("called at", trainer.global_step)

class Ends(Callback):  # in the middle of a step, where there are micro-batches
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.should_stop |= trainer.global_step == 2

class Fails(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            raise RuntimeError("of its own")

class Broken(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise ValueError(f"no metrics at {step}")
    def save(self):
        raise OSError(28, "No space left on device")
    def finalize(self, status):
        raise KeyError(status)

class Killed(CSVLogger):
    def log_metrics(self, metrics, step=None):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

class Fills(Callback):  # the disk of the logs
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            with open("logs/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))

class Late(schedules.Constant):
    def after_warmup(self, step, max_steps):
        return 1 / (3 - step)
"""


def table(heading: str) -> dict[str, str]:
    """Return a table of the page: what happens to each argument or callback."""
    section = (ROOT / "docs/lightning.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (\w+) \| (.+?) \|$", section, flags=re.MULTILINE)[1:])


ARGUMENTS, CALLBACKS = table("Arguments of the Trainer"), table("Callbacks")


@pytest.fixture
def fit(lm: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a short `lm fit`, four steps with two evaluations; the module `own` is there to name classes of."""
    (workplace / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(workplace)
    yield lambda *words: lm(*FAST, *words)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def named(*classes: str, **settings: Any) -> list[str]:
    """Return the words that name callbacks, the last with settings."""
    chosen = [{"class_path": name if "." in name else f"lightning.pytorch.callbacks.{name}"} for name in classes]
    chosen[-1]["init_args"] = settings  # type: ignore[assignment]
    return ["--trainer.callbacks", json.dumps(chosen)]


def weights(path: Path = LAST) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["state_dict"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(name: str = "tiny") -> list[dict[str, Any]]:
    return read_csv(Path("logs", name, "metrics.csv"))[1]


def steps(column: str) -> list[int]:
    """Return the steps at which a metric was logged."""
    return [int(row["step"]) for row in rows() if row.get(column)]


def done(answer: tuple[int, str, str]) -> str:
    code, out, err = answer
    assert code == 0, err
    assert "Traceback" not in out + err
    return out + err


# -- arguments

REFUSED: dict[str, Any] = {
    "barebones": True,
    "check_val_every_n_epoch": 1,
    "enable_checkpointing": False,
    "gradient_clip_algorithm": "value",
    "limit_predict_batches": 3,
    "limit_train_batches": 3,
    "max_epochs": 3,
    "min_epochs": 1,
    "model_registry": "there",
    "overfit_batches": 2,
    "reload_dataloaders_every_n_epochs": 1,
    "sync_batchnorm": True,
    "use_distributed_sampler": True,
}
SAME: dict[str, Any] = {  # may change how, and no bit of what is trained
    "accelerator": "cpu",
    "benchmark": True,
    "detect_anomaly": True,
    "deterministic": True,
    "devices": 1,
    "enable_autolog_hparams": False,
    "inference_mode": False,
    "limit_test_batches": 1,
    "num_nodes": 1,
    "num_sanity_val_steps": 2,
    "plugins": "[]",
    "strategy": "auto",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_argument(name: str, fit: Run) -> None:
    assert ARGUMENTS[name].startswith("refused: ")
    code, _, err = fit(f"--trainer.{name}", REFUSED[name])
    assert (code, err.count("\n")) == (2, 1), err
    assert f"trainer.{name}" in err
    assert ARGUMENTS[name].removeprefix("refused: ") in err
    assert not LAST.exists()


@pytest.mark.parametrize("name", often(SAME, 2))
def test_argument_that_changes_no_bit(name: str, fit: Run) -> None:
    assert ARGUMENTS[name].startswith("works")
    done(fit())
    done(fit("--name", "other", f"--trainer.{name}", SAME[name]))
    assert equal(weights(), weights(Path("checkpoints/other/last.ckpt")))


def precision(fit: Run) -> None:
    done(fit("--trainer.precision", "64-true"))
    assert {value.dtype for value in weights().values() if value.is_floating_point()} == {torch.float64}


def logger(fit: Run) -> None:
    done(fit("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "there"))
    (path,) = Path("there").rglob("metrics.csv")
    assert [int(row["step"]) for row in read_csv(path)[1] if row["train/loss"]] == [1, 2, 3, 4]
    done(fit("--name", "none", "--trainer.logger", "false"))
    assert not Path("logs/none/metrics.csv").exists()


def own_callback(fit: Run) -> None:
    told = done(fit(*named("own.Ends"), "--trainer.accumulate_grad_batches", 2))
    assert "ended after step 3 of 4: a callback set trainer.should_stop" in told


def fast_dev_run(fit: Run) -> None:
    assert "1/1  loss" in done(fit("--trainer.fast_dev_run", "true"))
    assert not LAST.exists()


def max_steps(fit: Run) -> None:
    done(fit("--trainer.max_steps", 3))
    assert checkpoint.peek(LAST).step == 3


def min_steps(fit: Run) -> None:
    stop = named("EarlyStopping", monitor="val_loss", stopping_threshold=99.0)
    assert "ended after step 3 of 4" in done(fit("--trainer.min_steps", 3, *stop))


def max_time(fit: Run) -> None:
    words = ["--trainer.max_steps", 100000, "--trainer.max_time", "{milliseconds: 50}"]
    words += ["--trainer.val_check_interval", 100000, "--checkpoint.every_n_steps", 100000]
    told = done(fit(*words))
    assert re.search(r"ended after step \d+ of 100000: trainer.max_time 0:00:00.050000 is over", told)
    first = checkpoint.peek(LAST).step
    done(fit(*words, "--ckpt_path", "last"))
    assert checkpoint.peek(LAST).step > first > 0
    for wrong in ("00:00:00:00", "soon", "{moons: 3}"):
        code, _, err = fit("--trainer.max_time", wrong, "--name", "none")
        assert (code, err.count("\n")) == (2, 1)
        assert "trainer.max_time" in err


def limit_val_batches(fit: Run) -> None:
    done(fit("--trainer.limit_val_batches", 0))
    assert "val/loss" not in rows()[0]
    done(fit("--name", "one", "--trainer.limit_val_batches", 1))
    done(fit("--name", "all"))
    assert rows("one")[1]["val/loss"] != rows("all")[1]["val/loss"]
    assert rows("one")[1]["train/loss"] == rows("all")[1]["train/loss"]


def val_check_interval(fit: Run) -> None:
    done(fit("--trainer.val_check_interval", 1))
    assert steps("val/loss") == [1, 2, 3, 4]
    done(fit("--name", "timed", "--trainer.val_check_interval", "00:00:10:00"))
    code, _, err = fit("--name", "part", "--trainer.val_check_interval", 0.5)
    assert (code, err.count("\n")) == (2, 1)
    assert "trainer.val_check_interval is 0.5: training has no epochs" in err


def log_every_n_steps(fit: Run) -> None:
    done(fit("--trainer.log_every_n_steps", 3))
    assert steps("train/loss") == [1, 3, 4]


def enable_progress_bar(fit: Run) -> None:
    assert "4/4" in done(fit("--trainer.enable_progress_bar", "true"))


def enable_model_summary(fit: Run) -> None:
    assert "Total params" in done(fit("--trainer.enable_model_summary", "true"))


def accumulate_grad_batches(fit: Run) -> None:
    words = ["--trainer.precision", "64-true", "--model.init_args.net.init_args.dropout", 0]
    done(fit(*words))
    done(fit(*words, "--name", "two", "--trainer.accumulate_grad_batches", 2))
    other = weights(Path("checkpoints/two/last.ckpt"))
    assert all(torch.allclose(value, other[key], rtol=1e-9) for key, value in weights().items())


def gradient_clip_val(fit: Run) -> None:
    words = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", 1.0]
    done(fit(*words, "--model.init_args.clip_norm", 0.25))
    done(fit(*words, "--name", "other", "--trainer.gradient_clip_val", 0.25))
    assert equal(weights(), weights(Path("checkpoints/other/last.ckpt")))


def profiler(fit: Run) -> None:
    for kind in ("simple", "advanced", "pytorch"):
        assert "Profiler Report" in done(fit("--name", kind, "--trainer.profiler", kind))
    assert list(Path("logs/pytorch").glob("*.pt.trace.json*"))
    code, _, err = fit("--trainer.profiler", "xla")
    assert (code, err.count("\n")) == (2, 1)


def default_root_dir(fit: Run) -> None:
    done(fit("--trainer.default_root_dir", "there"))
    assert Path("there/checkpoints/tiny/last.ckpt").exists()
    assert Path("there/logs/tiny/metrics.csv").exists()
    assert not Path("checkpoints").exists()
    assert not Path("logs").exists()
    done(fit("--trainer.default_root_dir", "there", "--ckpt_path", "last", "--trainer.max_steps", 5))
    assert checkpoint.peek(Path("there/checkpoints/tiny/last.ckpt")).step == 5


WORKS = {
    "accumulate_grad_batches": accumulate_grad_batches,
    "callbacks": own_callback,
    "default_root_dir": default_root_dir,
    "enable_model_summary": enable_model_summary,
    "enable_progress_bar": enable_progress_bar,
    "fast_dev_run": fast_dev_run,
    "gradient_clip_val": gradient_clip_val,
    "limit_val_batches": limit_val_batches,
    "log_every_n_steps": log_every_n_steps,
    "logger": logger,
    "max_steps": max_steps,
    "max_time": max_time,
    "min_steps": min_steps,
    "precision": precision,
    "profiler": profiler,
    "val_check_interval": val_check_interval,
}


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule")
@pytest.mark.parametrize("name", often(WORKS, [*WORKS][::3].__contains__))
def test_argument(name: str, fit: Run) -> None:
    assert ARGUMENTS[name].startswith("works")
    WORKS[name](fit)


def test_each_argument_has_a_row_and_each_row_a_test() -> None:
    assert ARGUMENTS.keys() == inspect.signature(Trainer).parameters.keys()
    assert ARGUMENTS.keys() == REFUSED.keys() | SAME.keys() | WORKS.keys()


# -- callbacks

REFUSED_CALLBACKS: dict[str, dict[str, Any]] = {
    "BackboneFinetuning": {},
    "BaseFinetuning": {},
    "BasePredictionWriter": {},
    "BatchSizeFinder": {},
    "EMAWeightAveraging": {},
    "GradientAccumulationScheduler": {"scheduling": {"0": 2}},
    "LearningRateFinder": {},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.5},
    "OnExceptionCheckpoint": {"dirpath": "there"},
    "ProgressBar": {},
    "SpikeDetection": {"exclude_batches_path": "there.json"},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "WeightAveraging": {},
}


@pytest.mark.parametrize("name", REFUSED_CALLBACKS)
def test_refused_callback(name: str, fit: Run) -> None:
    assert CALLBACKS[name].startswith("refused: ")
    code, _, err = fit(*named(name, **REFUSED_CALLBACKS[name]))
    assert (code, err.count("error: ")) == (2, 1), err
    assert err.splitlines()[-1].startswith(f"error: trainer.callbacks: {name}")
    assert CALLBACKS[name].removeprefix("refused: ") in err
    assert not LAST.exists()


def base(fit: Run, *way: object) -> None:
    done(fit(*named("Callback", "Checkpoint"), *way))


def function(fit: Run, *way: object) -> None:
    assert "called at 4" in done(fit(*named("LambdaCallback", on_train_end="own.shout"), *way))


def early_stopping(fit: Run, *way: object) -> None:
    done(fit(*way, "--name", "whole"))
    for name, monitor in (("tiny", "val_loss"), ("other", "train/loss")):
        stop = named("EarlyStopping", monitor=monitor, stopping_threshold=99.0)
        told = done(fit(*way, *stop, "--name", name))
        assert f"ended after step 2 of 4: EarlyStopping: Stopping threshold reached: {monitor} = " in told
    assert checkpoint.peek(LAST).step == 2
    done(fit(*way, "--ckpt_path", "last"))
    assert equal(weights(), weights(Path("checkpoints/whole/last.ckpt")))
    for monitor in ("val_los", "train/los"):
        code, _, err = fit(*way, *named("EarlyStopping", monitor=monitor), "--name", "none")
        assert (code, err.count("\n")) == (2, 1)
        assert f"monitor is {monitor}: there are" in err
    assert not Path("checkpoints/none/last.ckpt").exists()


def model_checkpoint(fit: Run, *way: object) -> None:
    chosen = named("ModelCheckpoint", dirpath="there", monitor="val_loss", filename="mine")
    assert "ModelCheckpoint: " in done(fit(*way, *chosen))
    assert checkpoint.peek(Path("there/mine.ckpt")).step in (2, 4)
    assert LAST.exists()
    code, _, err = fit(*way, *named("ModelCheckpoint", dirpath="checkpoints/none", save_last=True), "--name", "none")
    assert (code, err.count("\n")) == (2, 1)


def learning_rates(fit: Run, *way: object) -> None:
    done(fit(*way, *named("LearningRateMonitor"), "--trainer.log_every_n_steps", 2))
    done(fit(*way, *named("LearningRateMonitor"), "--ckpt_path", "last", "--trainer.max_steps", 6))
    both = [(row["lr-AdamW/pg1"], row["train/learning_rate"]) for row in rows() if row["train/loss"]]
    pairs = [pair for pair in both if pair[0]]  # of a call of several steps the last alone
    assert len(pairs) >= 3
    assert all(float(a) == float(b) for a, b in pairs)
    assert set(steps("lr-AdamW/pg1")) <= set(steps("train/loss"))
    assert "epoch" not in rows()[0]


def timer(fit: Run, *way: object) -> None:
    words = [*way, "--trainer.max_steps", 100000, "--trainer.val_check_interval", 100000]
    words += ["--checkpoint.every_n_steps", 100000, *named("Timer", duration={"milliseconds": 50})]
    assert "100000: Timer: duration 0:00:00.050000 is over" in done(fit(*words))
    first = checkpoint.peek(LAST).step
    assert f"ended after step {first} of" in done(fit(*words, "--ckpt_path", "last"))
    done(fit(*words, *named("Timer", duration={"hours": 1}), "--ckpt_path", "last", "--trainer.max_steps", first + 4))
    assert checkpoint.peek(LAST).step == first + 4 > 4
    for duration, interval in (("soon", "step"), ("00:00:00:00", "step"), ("00:00:00:01", "epoch")):
        wrong = named("Timer", duration=duration, interval=interval)
        code, _, err = fit(*way, *wrong, "--name", "none")
        assert (code, err.count("\n")) == (2, 1)
        assert "Timer" in err
        assert len(err) < 200


def device_stats(fit: Run, *way: object) -> None:
    CPUAccelerator.get_device_stats = lambda self, device: {"load": 0.5}  # type: ignore[method-assign]
    done(fit(*way, *named("DeviceStatsMonitor", cpu_stats=True)))
    logged = steps("DeviceStatsMonitor.on_train_batch_end/load")
    assert logged == ([2, 4] if "steps_per_call" in str(way) else [1, 2, 3, 4])


def throughput(fit: Run, *way: object) -> None:
    (count, length) = re.findall(r"lm\.training\.callbacks\.\w+\.\w+", CALLBACKS["ThroughputMonitor"])
    monitor = named("ThroughputMonitor", window_size=2, batch_size_fn=count, length_fn=length)
    assert "flops" not in done(fit(*way, *monitor))
    found = {int(row["step"]): float(row["train/samples"]) for row in rows() if row["train/samples"]}
    assert found == ({2: 8.0, 4: 16.0} if "steps_per_call" in str(way) else {1: 4.0, 2: 8.0, 3: 12.0, 4: 16.0})


def bar(kind: str) -> Callable[..., None]:
    def check(fit: Run, *way: object) -> None:
        assert "4/4" in done(fit(*way, *named(kind)))
        told = done(fit(*way, *named(kind), "--ckpt_path", "last", "--trainer.max_steps", 6))
        assert "6/6" in told
        assert "2/6" not in told  # it begins at 4
        assert "Epoch" not in told.splitlines()[-2]

    return check


def summary(kind: str) -> Callable[..., None]:
    def check(fit: Run, *way: object) -> None:
        assert "Total params" in done(fit(*way, *named(kind, max_depth=2)))

    return check


WORKING: dict[str, Callable[..., None]] = {
    "Callback": base,
    "Checkpoint": base,
    "DeviceStatsMonitor": device_stats,
    "EarlyStopping": early_stopping,
    "LambdaCallback": function,
    "LearningRateMonitor": learning_rates,
    "ModelCheckpoint": model_checkpoint,
    "ModelSummary": summary("ModelSummary"),
    "RichModelSummary": summary("RichModelSummary"),
    "RichProgressBar": bar("RichProgressBar"),
    "TQDMProgressBar": bar("TQDMProgressBar"),
    "ThroughputMonitor": throughput,
    "Timer": timer,
}


@pytest.mark.parametrize("way", often(WAYS))
@pytest.mark.parametrize("name", often(WORKING, [*WORKING][::3].__contains__))
def test_callback(name: str, way: str, fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CALLBACKS[name].startswith("works")
    monkeypatch.setattr(CPUAccelerator, "get_device_stats", CPUAccelerator.get_device_stats)
    WORKING[name](fit, *WAYS[way])


def test_each_callback_has_a_row_and_each_row_a_test() -> None:
    assert CALLBACKS.keys() == set(callbacks.__all__)
    assert CALLBACKS.keys() == REFUSED_CALLBACKS.keys() | WORKING.keys()


# -- errors that cost nothing


def test_an_early_end_waits_for_the_whole_step(fit: Run) -> None:
    """Random numbers of half a step would be drawn, and those of the resumed run be others."""
    words = ["--trainer.accumulate_grad_batches", 2]
    done(fit(*words, "--name", "whole"))
    done(fit(*words, *named("own.Ends")))
    assert checkpoint.peek(LAST).step == 3
    done(fit(*words, "--ckpt_path", "last"))
    assert equal(weights(), weights(Path("checkpoints/whole/last.ckpt")))


def test_a_callback_that_fails_between_two_steps_loses_none(fit: Run) -> None:
    with pytest.raises(RuntimeError, match="of its own"):
        fit(*named("own.Fails"))
    assert checkpoint.peek(LAST).step == 3


def test_a_logger_that_fails_is_said_once_and_costs_nothing(fit: Run) -> None:
    done(fit())
    code, _, err = fit("--name", "other", "--trainer.logger", "own.Broken", "--trainer.logger.save_dir", "there")
    assert code == 0
    for kind in ("ValueError: no metrics at 1", "OSError: [Errno 28] No space left on device", "KeyError: 'success'"):
        assert err.count(f"note: Broken failed ({kind}): training goes on") == 1
    assert err.count("\n") == 3
    assert equal(weights(), weights(Path("checkpoints/other/last.ckpt")))


@pytest.mark.slow
def test_a_full_disk_of_the_logs_costs_no_step(fit: Run, workplace: Path) -> None:
    (workplace / "logs").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "logs"]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        code, _, err = fit(*named("own.Fills"), "--trainer.max_steps", 40)
        assert code == 0, err
        assert 0 < err.count("note: ") == err.count("No space left on device") == err.count("\n") < 5, err
        assert checkpoint.peek(LAST).step == 40
        Path("logs/filler").unlink()
        assert "failed" not in done(fit("--ckpt_path", "last", "--trainer.max_steps", 42))
        assert [int(row["step"]) for row in rows()][-2:] == [41, 42]
    finally:
        subprocess.run(["umount", "logs"], check=True)


def test_a_signal_inside_a_logger_comes_through(fit: Run) -> None:
    code, _, err = fit("--trainer.logger", "own.Killed", "--trainer.logger.save_dir", "there")
    assert code == 143
    assert "note" not in err


@pytest.mark.parametrize(
    "hook", often(["before_step", "_write", "before_update", "on_validation_end", "on_train_end"], 2)
)
def test_a_figure_that_fails_is_said_and_costs_nothing(hook: str, fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm.training.callbacks import figures

    def fail(*_: Any) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr(figures.Figures, hook, fail if hook == "_write" else figures.harmless(fail))
    code, _, err = fit("--figures.every_n_steps", 1)
    assert (code, err.count("note: Figures failed (ValueError: no picture)")) == (0, 1)
    assert checkpoint.peek(LAST).step == 4


def test_a_sample_that_fails_is_said_and_costs_nothing(fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserWarning("no words")

    monkeypatch.setattr("lm.training.callbacks.samples.generate", fail)
    code, _, err = fit("--samples.max_new_tokens", 2)
    assert (code, err.count("note: SampleText failed (UserWarning: no words)")) == (0, 1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--samples.seed", "9" * 21], "samples.seed"),
        (["--samples.prompt", "\udcff"], "samples.prompt"),
        (["--model.init_args.schedule", "own.Late"], "model.schedule Late fails at step 4 of 4: ZeroDivisionError"),
        (["--model.init_args.schedule.min_factor", -1, "--model.init_args.schedule.warmup_steps", 0], "min_factor"),
    ],
)
def test_what_only_a_later_step_uses_is_checked_before_the_first(words: list[Any], told: str, fit: Run) -> None:
    code, out, err = fit(*words)
    assert (code, err.count("\n")) == (2, 1), err
    assert told in err.replace("gives -", "min_factor gives -")
    assert "loss" not in out


def test_the_page_s_recipe_is_one(fit: Run, workplace: Path) -> None:
    (chosen,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/lightning.md").read_text(), flags=re.DOTALL)
    (workplace / "more.yaml").write_text(yaml.safe_dump(yaml.safe_load(chosen)))
    done(fit("--config", "more.yaml", "--name", "tiny"))
