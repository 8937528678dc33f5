"""Stops at every moment: a signal, a closed terminal or a reader that goes lose nothing, and say what is there."""

import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lm.checkpoints import checkpoint
from tests.conftest import ROOT, start
from tests.support.cases import often
from tests.support.runs import assert_runs_equal, stop_with, table

FIT = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", 4, "--samples.max_new_tokens", 2]
FIT += ["--checkpoint.every_n_steps", 2]
FIT += ["--model.init_args.schedule.init_args.warmup_steps", 1]  # the last step's rate is not the first one's
EVALUATIONS = {
    "at an interval": ["--trainer.val_check_interval", 2],
    "only at the end": ["--trainer.val_check_interval", 100],
    "between periodic checkpoints": ["--trainer.val_check_interval", 4, "--checkpoint.every_n_steps", 3],
    "several steps a call": ["--trainer.val_check_interval", 2, "--model.init_args.steps_per_call", 2],
    "last call shorter": [
        *("--trainer.val_check_interval", 3, "--checkpoint.every_n_steps", 3, "--model.init_args.steps_per_call", 3)
    ],
    "accumulated": ["--trainer.val_check_interval", 2, "--trainer.accumulate_grad_batches", 2],
}


def at_forward(number: int, signum: int = 15) -> list[object]:
    words = ["--trainer.callbacks+", "tests.support.stop.StopAtForward"]
    return [*words, f"--trainer.callbacks.number={number}", f"--trainer.callbacks.signum={signum}"]


def files(run: str) -> list[str]:
    return sorted(path.name for path in Path("checkpoints", run).glob("*.ckpt"))


def goes_on_to_the_same(lm, recipe: list[object], number: int) -> None:
    """Stop a run at a forward pass, and again at the first one after that; let it go on to its end."""
    name = f"parts{number}"
    words = [*recipe, "--name", name, "--ckpt_path", "auto"]
    codes = [lm(*words, *at_forward(number))[0], lm(*words, *at_forward(1))[0]]
    code, out, _ = lm(*words, "--json")
    assert code == 0 and set(codes) <= {0, 143}, (number, codes, code)
    assert f'"step": 4, "loss": {table("whole")[-1]["train/loss"]}, "val_loss": {table("whole")[-1]["val/loss"]}' in out
    assert_runs_equal("whole", name)
    assert files(name) == files("whole"), number


@pytest.mark.parametrize("evaluation", often(["at an interval", "only at the end", "between periodic checkpoints"]))
def test_a_stop_in_the_last_step_is_made_up_for(lm, workplace: Path, evaluation: str) -> None:
    recipe = [*FIT, *EVALUATIONS[evaluation]]
    assert lm(*recipe, "--name", "whole", *at_forward(0))[0] == 0
    passes = int(Path("passes").read_text())
    evaluated = (passes - 4) // 2 if evaluation == "at an interval" else passes - 4
    goes_on_to_the_same(lm, recipe, passes - evaluated)  # the last step's own


@pytest.mark.parametrize(
    "evaluation",
    [pytest.param(name, marks=pytest.mark.long if i % 2 else pytest.mark.slow) for i, name in enumerate(EVALUATIONS)],
)
def test_a_stop_at_any_forward_pass_is_made_up_for(lm, workplace: Path, evaluation: str) -> None:
    recipe = [*FIT, *EVALUATIONS[evaluation]]
    assert lm(*recipe, "--name", "whole", *at_forward(0))[0] == 0
    passes = int(Path("passes").read_text())
    assert passes >= 8
    for number in range(1, passes + 1):
        goes_on_to_the_same(lm, recipe, number)


LAST = "checkpoints/tiny/last.ckpt"


@pytest.mark.parametrize(("signum", "code"), [("SIGHUP", 129), ("SIGUSR1", 143)])
def test_a_signal_stops_under_its_own_name(lm, workplace: Path, signum: str, code: int) -> None:
    number = int(getattr(signal, signum))
    stop = [*stop_with("StopAt", 3), f"--trainer.callbacks.signum={number}"]
    returned, _, err = lm(*FIT, *stop)
    assert returned == code
    assert err == f"stopped by {signum} after step 3; {LAST} has step 3: continue with --ckpt_path auto\n"


@pytest.mark.parametrize("signals", [(1, 1), (15, 1), (1, 15)])
def test_a_terminal_that_is_closed_counts_once(lm, workplace: Path, signals: tuple[int, int]) -> None:
    """The kernel and the shell both send SIGHUP; systemd sends it after SIGTERM."""
    first, second = signals
    both = [f"--trainer.callbacks.first={first}", f"--trainer.callbacks.second={second}"]
    code, _, err = lm(*FIT, *stop_with("StopTwice", 3), *both)
    assert code == 128 + max(signals) and checkpoint.peek(Path(LAST)).step == 3, err


def test_a_second_ctrl_c_while_the_first_is_saved_says_what_is_there(lm, workplace: Path) -> None:
    code, _, err = lm(*FIT, *stop_with("StopWhileSaving", 1))
    assert code == 130
    assert err == f"stopped by SIGINT after step 1; {LAST} has step 1: continue with --ckpt_path auto\n"
    assert checkpoint.damage(Path(LAST)) is None


def long(*words: object) -> list[object]:
    return ["fit", "--config", "tiny.yaml", "--trainer.max_steps", 100_000, *words]


def wait_for_a_checkpoint(process: subprocess.Popen[str]) -> None:
    while not Path(LAST).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["stdout", "both", "json"])
def test_a_reader_that_goes_stops_the_run_with_a_checkpoint(workplace: Path, how: str) -> None:
    both = {} if how == "stdout" else {"stderr": subprocess.STDOUT}
    process = start(*long(*["--json"] * (how == "json")), cwd=workplace, **both)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.stdout.close()
    code = process.wait(60)
    assert code == 141, process.stderr and process.stderr.read()
    step = checkpoint.peek(Path(LAST)).step
    assert 0 < step < 100_000
    if process.stderr is not None:
        assert process.stderr.read().startswith(f"stopped by SIGPIPE after step {step}; {LAST} has step {step}")


def test_a_full_disk_under_standard_output_costs_no_step(workplace: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(*FIT, cwd=workplace, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: standard output: No space left on device; the run is finished\n"
    assert checkpoint.peek(Path(LAST)).step == 4


@pytest.mark.parametrize("number", often([2, 1]))
def test_a_closed_terminal_stops_a_run_unless_it_is_under_nohup(workplace: Path, number: int) -> None:
    """A real terminal that goes: the kernel sends SIGHUP, and what is written to it is an error from then on."""
    nohup = ["nohup"] * (number - 1)
    terminal, other = os.openpty()
    words = [*nohup, sys.executable, "-m", "lm", *map(str, long("--trainer.log_every_n_steps", 20))]
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *words], stdin=other, stdout=other, stderr=other, cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(other)
    wait_for_a_checkpoint(process)
    os.close(terminal)
    if number == 1:
        process.wait(60)
        return
    before = checkpoint.peek(Path(LAST)).step
    try:
        while checkpoint.peek(Path(LAST)).step < before + 20:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def done(lm, *words: object) -> tuple[str, dict]:
    """Fit, once for people and once as JSON; return the last line of both."""
    for_people, for_machines = lm(*FIT, *words), lm(*FIT, *words, "--name", "json", "--json")
    assert for_people[0] == for_machines[0] == 0, for_people[2] + for_machines[2]
    return for_people[1].splitlines()[-1], json.loads(for_machines[1].splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "saved", "metrics"),
    [
        ([], f"; {LAST}", "; metrics in logs/tiny"),
        (["--trainer.fast_dev_run", "true"], "; no checkpoint is kept", ""),
        (["--trainer.logger", "false"], f"; {LAST}", ""),
        (
            ["--trainer.logger", '{"class_path": "CSVLogger", "init_args": {"save_dir": "mine", "name": "x"}}'],
            f"; {LAST}",
            "; metrics in mine/x/version_0",
        ),
    ],
)
def test_the_last_line_names_what_is_there(lm, workplace: Path, words: list[str], saved: str, metrics: str) -> None:
    line, values = done(lm, *words)
    assert line.startswith("done: step ") and line.endswith(f" s{saved}{metrics}")
    assert values["ckpt_path"] == ("checkpoints/json/last.ckpt" if LAST in saved else None)
    assert files("tiny") == files("json") and ("last.ckpt" in files("tiny")) == (LAST in saved)


def test_a_new_run_that_begins_at_the_end_has_its_own_checkpoints(lm, workplace: Path) -> None:
    assert lm(*FIT)[0] == 0
    code, out, _ = lm(*FIT, "--name", "new", "--ckpt_path", LAST)
    assert code == 0 and "step 4 is done, trainer.max_steps is 4: no step is left to train" in out
    assert out.splitlines()[-1].endswith("; checkpoints/new/last.ckpt; metrics in logs/new")
    assert files("new") == ["best.ckpt", "last.ckpt", "step=0000004.ckpt"]
    assert table("new")[-1]["step"] == "4" and table("new")[-1]["val/loss"] == table("tiny")[-1]["val/loss"]


def test_a_last_step_below_what_is_done_is_said_and_nothing_is_written_again(lm, workplace: Path) -> None:
    assert lm(*FIT)[0] == 0
    before = Path(LAST).read_bytes()
    code, out, _ = lm(*FIT, "--ckpt_path", "last", "--trainer.max_steps", 2)
    assert code == 0 and "step 4 is done, trainer.max_steps is 2: no step is left to train" in out
    assert "done: step 4" in out and Path(LAST).read_bytes() == before


@pytest.mark.parametrize("columns", [40, 120])
def test_a_narrow_terminal_shows_the_loss_and_ctrl_c_leaves_one_bar(workplace: Path, columns: int) -> None:
    terminal, other = os.openpty()
    termios.tcsetwinsize(other, (25, columns))
    words = map(str, long("--trainer.val_check_interval", 100_000, "--model.init_args.steps_per_call", 2))
    process = start(
        *words,
        "--checkpoint.every_n_steps",
        1000,
        cwd=workplace,
        stdout=other,
        stderr=other,
        environment={"PYTHONUNBUFFERED": ""},
    )
    os.close(other)
    shown = b""
    while shown.count(b" loss ") < 3:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # EIO is the end
        while more := os.read(terminal, 4096):
            shown += more
    assert process.wait(60) == 130
    *lines, bar, stopped, rest = shown.decode().replace("\r\n", "\n").split("\n")
    assert stopped.startswith("stopped by SIGINT after step ") and rest == "" and "/100000" not in "".join(lines)
    states = bar.split("\r")
    step = checkpoint.peek(Path(LAST)).step
    assert states[-1].startswith(f"{step}/100000 loss ") and f"after step {step};" in stopped
    assert all(re.match(r"\d+/100000 loss \d\.\d{4} \|", one) and len(one) <= columns for one in states[2:])
