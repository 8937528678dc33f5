"""Messages say what was found, in one line."""

from collections.abc import Callable

import pytest
from lightning.pytorch.callbacks import rich_model_summary
from lightning.pytorch.callbacks.progress import rich_progress

Run = Callable[..., tuple[int, str, str]]
OPTIMIZER = "--model.init_args.optimizer.init_args.betas"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--trainer.devices", "-2"), "trainer.devices: found '-2': say how many processes: 1 or more, or auto"),
        (("--trainer.devices", "abc"), "trainer.devices: found 'abc': say"),
        (("--trainer.devices", "1.5"), "trainer.devices: found '1.5': say"),
        (("--trainer.devices", "0"), "trainer.devices: found '0': say"),
        (("--trainer.devices", "[]"), "trainer.devices: found []: say"),
        (("--trainer.devices", "-1"), "trainer.devices: found '-1': say"),
        ((OPTIMIZER, "[0.9]"), "betas: found '[0.9]', expected a list of 2"),
        ((OPTIMIZER, "[0.9, 0.8, 0.7]"), "betas: found '[0.9, 0.8, 0.7]', expected a list of 2"),
        ((OPTIMIZER, "[a, b]"), "betas: found '[a, b]', expected float in it"),
    ],
    ids=str,
)
def test_what_was_found_is_said(lm: Run, words: tuple[str, str], expected: str) -> None:
    optimizer = ("--model.init_args.optimizer", "torch.optim.AdamW")
    code, _, err = lm("fit", "--config", "tiny.yaml", *optimizer, *words)
    assert code == 2 and len(err.splitlines()) == 1 and expected in err, err


def test_devices_that_are_said_right(lm: Run) -> None:
    for devices in ("1", "auto"):
        code, _, err = lm("fit", "--config", "tiny.yaml", "--trainer.devices", devices, "--trainer.fast_dev_run", 1)
        assert code == 0, err


@pytest.mark.parametrize("name", ["foo", "fitt", "sampel", "x" * 900])
def test_an_unknown_command_is_one_line(lm: Run, name: str) -> None:
    code, out, err = lm(name)
    assert code == 2 and not out and len(err.splitlines()) == 1 and len(err) < 250
    assert {"fitt": "did you mean fit?", "sampel": "did you mean sample?"}.get(
        name, "say one of fit, validate, "
    ) in err


@pytest.mark.parametrize("name", ["RichProgressBar", "RichModelSummary"])
def test_rich_that_is_missing_is_one_line(lm: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rich_progress, rich_model_summary):
        monkeypatch.setattr(module, "_RICH_AVAILABLE", False)
    code, _, err = lm("fit", "--config", "tiny.yaml", "--trainer.callbacks", f"lightning.pytorch.callbacks.{name}")
    assert (
        code == 2 and len(err.splitlines()) == 1 and f"{name}: package rich is not installed: pip install rich" in err
    )


def test_a_gpu_that_is_missing_is_said_before_its_number(lm: Run) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", "--trainer.accelerator", "gpu", "--trainer.devices", "-1")
    assert code == 2 and "found" not in err and len(err.splitlines()) == 1, err
