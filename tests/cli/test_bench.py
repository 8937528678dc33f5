"""`lm bench`: figures that agree with each other and with the recipe, and nothing left behind."""

import json
import tempfile
from pathlib import Path

import pytest

from tests.conftest import TEXT

BENCH = ("bench", "--config", "tiny.yaml", "--steps", 2)
BY_HAND = ("--model", "lm.training.LanguageModel", "--model", "lm.training.ManualLanguageModel")
TOKENS = len({*TEXT})
EAGER = ("--model.init_args.compile", "false")


@pytest.fixture(autouse=True)
def _empty(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files are made where the test sees them."""
    (workplace / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(workplace / "temporary"))


def figures(out: str, tokens: int) -> dict:
    result: dict = json.loads(out.splitlines()[-1])
    for one in (result, *result["rows"]):
        seconds = one["step_ms"] / 1000
        assert one["tokens_per_second"] * seconds == pytest.approx(tokens, rel=1e-3)
        assert one["peak_memory_mb"] > 50 and one["mfu"] > 0
    for one in result["rows"]:
        expected = result["flops_per_token"] * one["tokens_per_second"] / one["peak_flops"]
        assert one["mfu"] == pytest.approx(expected, rel=1e-3)
    return result


def test_autograd_and_by_hand_side_by_side(lm, workplace: Path) -> None:
    before = {path.name for path in workplace.iterdir()}
    code, out, err = lm(*BENCH, *BY_HAND, *EAGER, "--json")
    assert code == 0, err
    result = figures(out, 64)
    assert {"step_ms", "tokens_per_second", "peak_memory_mb", "parameters", "flops_per_token", "mfu"} <= result.keys()
    assert result["parameters"] == 4048
    assert result["flops_per_token"] == 6 * (12 * 16**2 + 16 * TOKENS) + 12 * 16 * 16  # Chinchilla's, appendix F
    autograd, by_hand = result["rows"]
    assert [*autograd["parts_ms"]] == ["data", "forward", "backward", "update", "logging"]
    assert [*by_hand["parts_ms"]] == ["data", "forward_backward", "update", "logging"]
    for one in (autograd, by_hand):
        assert all(part > 0 for part in one["parts_ms"].values())
        assert sum(one["parts_ms"].values()) == pytest.approx(one["step_ms"], rel=0.5)
    best = min(result["rows"], key=lambda one: one["step_ms"])
    assert result["step_ms"] == best["step_ms"]
    assert f"--model {best['model']} --model.init_args.compile false" in err or "none is clearly faster" in err
    assert "forward + backward" in err and err.count("GFLOP/s") == 1
    assert not [*(workplace / "temporary").iterdir()]
    assert {path.name for path in workplace.iterdir()} - {"data"} == before  # data: the corpus in tokens


def test_a_text(lm, workplace: Path) -> None:
    code, out, err = lm(*BENCH, "--generate", "--json")
    assert code == 0, err
    result = figures(out, 1)
    assert [one["dtype"] for one in result["rows"]] == ["float32", "bfloat16", "int8"]
    assert result["flops_per_token"] == 2 * (12 * 16**2 + 16 * TOKENS) + 4 * 16 * 16  # a forward pass
    assert "ms a token" in err and err.count("GFLOP/s") == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps", 0), "--steps is 0: it must be at least 1"),
        (("--model",), "--model: it has no value: name a class"),
        (("--model", "lm.training.Manual"), "class_path lm.training.Manual: no such class: did you mean"),
        (("--generate", *BY_HAND), "--generate: gradients take no part in it: say --model once"),
        (("--ckpt_path", "last"), "unknown option or key ckpt_path: did you mean init_from?"),
        (("--trainer.devices", 3), "data.batch_size 4 is not divisible by 3 processes"),
        ((*BY_HAND[2:], "--trainer.precision", "bf16-true"), "trainer.precision bf16-true with Manual"),
    ],
)
def test_bad_input(lm, workplace: Path, words: tuple, expected: str) -> None:
    code, out, err = lm(*BENCH, *words)
    assert code == 2 and expected in err and len(err.splitlines()) == 1 and not out
    assert not [*(workplace / "temporary").iterdir()]
