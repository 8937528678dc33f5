"""Every network trains, resumes and samples where no tensor may be on another device than the module's."""

import faulthandler
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm.checkpoints import checkpoint
from lm.cli import main
from lm.generation import load_network
from lm.generation.engine import Engine, Request
from lm.models import Bigram
from lm.training import step
from lm.training.guard import Later
from tests.conftest import ROOT
from tests.support import pretended
from tests.support.cases import often
from tests.support.networks import NETWORKS, recipe
from tests.support.runs import assert_equal, state, stop_with, table

FUSED = ("--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.fused", "true")
MODULES = (pytest.param("LanguageModel", marks=pytest.mark.slow), "ManualLanguageModel")  # the first: in processes


class Forgetful(Bigram):
    """Makes a tensor without `device=`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + torch.zeros(self.vocab_size)


SAID = "LM_TEST_DEVICES"
"""The variable that names the file in which a process of pytest's for one test writes what its fork said."""


def in_a_fork(work: Callable[[], None], module: str = "LanguageModel") -> str:
    """Run what no process can take back in another one; return what it printed.

    Where autograd has run in this process, no fork of it can use autograd on a new device: so the test runs once more,
    in a process of pytest's own, and this one takes what came out.
    """
    if module == "LanguageModel" and SAID not in os.environ:
        file, test = Path("fork.json").absolute(), os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {SAID: str(file)}, capture_output=True, text=True)
        assert file.exists(), done.stdout
        code, text = json.loads(file.read_text())
    else:
        code, text = forked(work)
        if SAID in os.environ:
            Path(os.environ[SAID]).write_text(json.dumps([code, text]))
    assert code == 0, text
    return text


def forked(work: Callable[[], None]) -> tuple[int, str]:
    """Return the exit code and the output of a fork of this process."""
    said = Path("said")
    pid = os.fork()
    if not pid:
        code = 1
        with said.open("w", buffering=1) as output, redirect_stdout(output), redirect_stderr(output):
            try:
                faulthandler.enable(output)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text()


def fit(*words: object) -> int:
    short = ("--trainer.max_steps", 6, "--trainer.val_check_interval", 3, *pretended.OPTIONS)
    return main([str(word) for word in ("fit", "--config", "net.yaml", *short, *words)])


def cases() -> Iterator[Any]:
    """Yield networks and modules: one of each in make test and make test-slow, by autograd the others in test-long."""
    for name in NETWORKS:
        first = name == "GPT today"
        yield pytest.param(name, "ManualLanguageModel", marks=[] if first else pytest.mark.slow)
        yield pytest.param(name, "LanguageModel", marks=pytest.mark.slow if first else pytest.mark.long)


@pytest.mark.parametrize(("name", "module"), list(cases()))
def test_all_tensors_are_on_the_modules_device(workplace: Path, name: str, module: str) -> None:
    recipe(name)
    last = Path("checkpoints/parts/last.ckpt")

    def work() -> None:
        device = pretended.register()
        words = ("--model", f"lm.training.{module}", *FUSED)
        assert fit(*words, "--name", "whole") == 0
        assert fit(*words, "--name", "parts", *stop_with("StopAt", 4)) == 143
        assert fit(*words, "--name", "parts", "--ckpt_path", "last") == 0
        assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(last))
        words = ("sample", "--ckpt_path", str(last), "--device", pretended.NAME, "--num_samples", "2")
        assert main([*words, "--max_new_tokens", "20", "--temperature", "0.9", "--top_k", "5"]) == 0
        fitted = load_network(last, device)
        requests = [Request(prompt=[0], seed=seed, max_new_tokens=5) for seed in range(3)]
        list(Engine(fitted.net, fitted.tokenizer, slots=2).run(requests))

    said = in_a_fork(work, module)
    assert "failed" not in said  # a callback's error does not end training
    assert f"on 1 x {pretended.NAME}" in said


def test_a_tensor_made_elsewhere_is_found(workplace: Path) -> None:
    recipe("GPT")

    def work() -> None:
        pretended.register()
        fit("--model.init_args.net", f"{__name__}.Forgetful")

    with pytest.raises(AssertionError, match=r"add: expected all tensors on pretended, found one on cpu"):
        in_a_fork(work, "before any backward pass")


@pytest.mark.parametrize("module", MODULES)
def test_a_gpu_leaves_out_what_is_not_finite_without_being_waited_for(workplace: Path, module: str) -> None:
    """The same weights, optimizer's state, counts and means as with a look at each step's loss, as a CPU has it."""
    recipe("GPT")
    words = ("--model", f"lm.training.{module}", *FUSED, "--model.init_args.on_nonfinite", "skip")
    words = (*words, "--trainer.max_steps", 12, "--checkpoint.every_n_steps", 7)

    def work() -> None:
        pretended.register()
        read = count_reads()
        spoil(3, 7, 9, 10)
        assert fit(*words, "--name", "waits", "--trainer.log_every_n_steps", 1) == 0
        assert not read
        assert fit(*words, "--name", "runs_on", "--trainer.log_every_n_steps", 12) == 0
        assert len(read) == 6  # all but the logged ones, 1 and 12, and what follows a bad one: 4, 8, 10, 11
        waits, runs_on = (checkpoint.load(Path(f"checkpoints/{name}/last.ckpt")) for name in ("waits", "runs_on"))
        for key in ("state_dict", "optimizer_states"):
            assert_equal(waits[key], runs_on[key])
        assert waits["lm"]["guard"] == runs_on["lm"]["guard"] and waits["lm"]["guard"]["skipped"] == 4
        rows = {name: table(name) for name in ("waits", "runs_on")}
        steps = {name: [row["step"] for row in rows[name] if row["train/skipped"]] for name in rows}
        assert steps["waits"] == steps["runs_on"] == ["3", "7", "9", "10"]
        losses = [float(row["train/loss"]) for row in rows["waits"] if row["train/loss"] not in ("", "nan")]
        assert float(rows["runs_on"][-1]["train/loss"]) == pytest.approx(sum(losses[1:]) / len(losses[1:]))

    assert in_a_fork(work, module).count("was skipped, 4 so far") == 2


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("bad", often([6, 4, 5]))  # before an evaluation, in the middle, before a checkpoint
def test_a_step_heard_of_later_stops_the_run_where_it_was(workplace: Path, module: str, bad: int) -> None:
    recipe("GPT")
    words = ("--model", f"lm.training.{module}", *FUSED, "--trainer.max_steps", 12)
    words = (*words, "--trainer.val_check_interval", 6, "--checkpoint.every_n_steps", 5)

    def work() -> None:
        pretended.register()
        read = count_reads()
        spoil(bad)
        for name, every in (("waits", 1), ("runs_on", 12)):
            assert fit(*words, "--name", name, "--trainer.log_every_n_steps", every) == 1
        assert len(read) == bad - 1
        waits, runs_on = (checkpoint.load(Path(f"checkpoints/{name}/last.ckpt")) for name in ("waits", "runs_on"))
        assert waits["global_step"] == runs_on["global_step"] == bad - 1
        for key in ("state_dict", "optimizer_states"):
            assert_equal(waits[key], runs_on[key])
        assert not any(row.get("val/loss") for row in table("runs_on"))
        stop = stop_with("StopAt", bad)  # a signal at that step changes nothing: it was not taken
        assert fit(*words, *stop, "--name", "signal", "--trainer.log_every_n_steps", 12) == 1
        assert checkpoint.peek(Path("checkpoints/signal/last.ckpt")).step == bad - 1

    assert in_a_fork(work, module).count(f"error: step {bad}: loss nan") == 3


@pytest.mark.parametrize("module", MODULES)
def test_a_step_that_is_not_logged_waits_for_nothing(workplace: Path, module: str) -> None:
    recipe("GPT")

    def work() -> None:
        pretended.register()
        begin, waits = step.Step.begin, {}

        def noted(self: step.Step, done: int) -> None:
            waits[done + 1] = list(pretended.waited)
            begin(self, done)

        step.Step.begin = noted  # type: ignore[method-assign]
        words = ("--trainer.max_steps", 9, "--trainer.val_check_interval", 9, "--trainer.log_every_n_steps", 9)
        assert fit("--model", f"lm.training.{module}", *FUSED, *words, "--checkpoint.every_n_steps", 100) == 0
        assert waits[2], "the first step is logged"
        assert waits[9] == waits[2]

    in_a_fork(work, module)


def count_reads() -> list[int]:
    """Return a list that grows whenever a step is judged that was not waited for."""
    found: list[int] = []

    class Counted(Later):
        def read(self) -> list[float]:
            found.append(1)
            return super().read()

    step.Later = Counted  # type: ignore[misc]
    return found


def spoil(*steps: int) -> None:
    """Make the loss and the gradient of some steps NaN."""
    settle = step.Step.settle

    def spoilt(self: step.Step, number: int) -> None:
        if number in steps:
            self.losses[:] = [loss * math.nan for loss in self.losses]
            for parameter in self.fitted:
                parameter.grad *= math.nan  # type: ignore[operator]
        settle(self, number)

    step.Step.settle = spoilt  # type: ignore[method-assign]
