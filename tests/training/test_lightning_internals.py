"""Each private name of Lightning that lm leans on: one that is renamed is found here, and not in a run."""

import ast
import re
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lm.training import lightning_internals
from lm.training.lightning_internals import SubprocessLauncher
from tests.conftest import ROOT

HERE = ROOT / "lm/training/lightning_internals.py"
OWN = {"_call_children_scripts", "_configure_launcher", "_data_parallel_size", "_tensor_parallel_size", "_experiment"}
"""Overridden or set by subclasses, which cannot do so elsewhere; see below."""


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=3, barebones=False)


def test_no_other_file_imports_them() -> None:
    found = []
    for path in (ROOT / "lm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning") and path != HERE:
                found += [f"{path}: {one.name}" for one in node.names if one.name.startswith("_")]
    assert found == []


def test_no_other_file_reaches_into_a_trainer() -> None:
    reach = re.compile(r"\b(?:trainer|strategy|loop|epoch_loop|fit_loop|callback|optimizer|launcher)\._[a-z]\w*")
    files = {path: reach.findall(path.read_text()) for path in (ROOT / "lm").rglob("*.py") if path != HERE}
    assert {path: names for path, names in files.items() if names} == {}


def test_loops_are_replaced(trainer: Trainer) -> None:
    lightning_internals.begin_and_end_always(trainer)
    lightning_internals.number_by_steps(trainer)
    assert isinstance(trainer.fit_loop, lightning_internals.WholeFit)
    assert trainer.fit_loop.skip is False
    trainer.fit_loop.epoch_loop.batch_progress.total.ready = 2
    assert lightning_internals.step_under_way(trainer) == 2
    trainer.fit_loop.epoch_loop.batch_progress.total.ready = 9
    assert lightning_internals.step_under_way(trainer) == 3, "no step is above max_steps"
    assert "_batches_that_stepped" in vars(type(trainer.fit_loop.epoch_loop).__mro__[1])["__init__"].__code__.co_names
    assert trainer._logger_connector.should_update_logs in (True, False)  # reads trainer._active_loop


def test_steps_are_counted(trainer: Trainer) -> None:
    trainer.strategy._lightning_module = LightningModule()
    trainer.strategy._lightning_module.automatic_optimization = False
    lightning_internals.count_step(trainer)
    assert trainer.global_step == 1
    lightning_internals.restore(trainer, {"global_step": 7, "loops": {}})
    assert trainer.global_step == 7
    for by_lightning in (False, True):
        trainer.strategy._lightning_module.automatic_optimization = by_lightning
        lightning_internals.take_back_step(trainer)
        assert trainer.global_step == 6


def test_signals_and_launchers(trainer: Trainer) -> None:
    lightning_internals.take_no_signals(trainer)
    assert trainer._signal_connector.register_signal_handlers() is None
    launcher = SubprocessLauncher(LightningEnvironment(), 2, 1)
    assert launcher.procs == []
    lightning_internals.launch_by(trainer, launcher)
    assert trainer.strategy.launcher is launcher
    lightning_internals.check_environment(trainer)


@pytest.mark.parametrize("owner", [SubprocessLauncher, ModelParallelStrategy, DDPStrategy])
def test_what_subclasses_override_is_there(owner: type) -> None:
    names = {
        SubprocessLauncher: ["_call_children_scripts"],
        ModelParallelStrategy: ["_configure_launcher"],
        DDPStrategy: ["_configure_launcher"],
    }
    assert [name for name in names[owner] if not callable(getattr(owner, name, None))] == []


def test_strategies() -> None:
    strategy = DDPStrategy(accelerator=None, parallel_devices=[torch.device("cpu")])
    assert lightning_internals.backend(strategy) == "gloo"
    lightning_internals.add_ddp_settings(strategy, bucket_cap_mb=3)
    lightning_internals.add_ddp_settings(strategy, bucket_cap_mb=4)
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 3, "a recipe's own stands"
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    assert (sharded._data_parallel_size, sharded._tensor_parallel_size) == (2, 1)


def test_small_things() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert lightning_internals.inner(LightningOptimizer(optimizer)) is optimizer
    assert lightning_internals.inner(optimizer) is optimizer
    assert lightning_internals.duration(Timer(timedelta(seconds=5))) == 5
    with lightning_internals.default_dtype(torch.bfloat16):
        assert torch.zeros(1).dtype == torch.bfloat16
    module = torch.nn.Linear(2, 2)
    lightning_internals.leave_to_each_rank(module, ["bias"])
    assert module._ddp_params_and_buffers_to_ignore == ["bias"]
