"""Training by hand: the same numbers as by autograd, the same checkpoints, and no graph."""

from pathlib import Path

import pytest
import torch
import yaml

from lm.backprop.rules import _rules
from lm.generation import load_network
from lm.models.feed_forward import GELU
from tests.conftest import start
from tests.support.cases import often
from tests.support.networks import NETWORKS, recipe
from tests.support.runs import assert_equal, state, stop_with, table

MANUAL = ("--model", "lm.training.ManualLanguageModel")
TEXT_DATA = {
    "class_path": "lm.data.TextData",
    "init_args": {"corpus": "text.txt", "block_size": 8, "batch_size": 8},
}
DOUBLE = ("--trainer.precision", "64-true")


def losses(name: str) -> list[float]:
    return [float(row["train/loss"]) for row in table(name) if row["train/loss"]]


@pytest.fixture
def no_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)


@pytest.mark.parametrize("name", often(NETWORKS, 2))
def test_losses_are_autograds(lm, workplace: Path, name: str) -> None:
    recipe(name, steps_per_call=1)
    words = ["fit", "--config", "net.yaml", *DOUBLE, "--trainer.max_steps", 40, "--trainer.val_check_interval", 20]
    assert lm(*words, "--name", "graph")[0] == 0
    code, _, err = lm(*words, "--name", "hand", *MANUAL)
    assert code == 0, err
    assert losses("hand") == pytest.approx(losses("graph"), rel=1e-9)
    config = yaml.safe_load(Path("logs/hand/config.yaml").read_text())["model"]
    graph = yaml.safe_load(Path("logs/graph/config.yaml").read_text())["model"]
    assert config["class_path"] == MANUAL[1]
    assert config["init_args"] | graph["init_args"] == config["init_args"]


@pytest.mark.parametrize("name", ["MLP", "GPT", "Seq2Seq"])
def test_trains_without_autograd_and_resumes_exactly(lm, workplace: Path, no_autograd: None, name: str) -> None:
    recipe(name)
    words = ["fit", "--config", "net.yaml", *MANUAL]
    assert lm(*words, "--name", "whole")[0] == 0
    assert lm(*words, "--name", "parts", *stop_with("StopAt", 7))[0] == 143
    assert lm(*words, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path("checkpoints/parts/last.ckpt")))
    assert table("whole") == table("parts")
    assert lm("validate", "--ckpt_path", "checkpoints/whole/last.ckpt")[0] == 0
    assert lm("sample", "--ckpt_path", "checkpoints/whole/last.ckpt")[0] == 0


@pytest.mark.parametrize("first", ["hand", "graph"])
def test_checkpoints_go_both_ways(lm, workplace: Path, first: str) -> None:
    recipe("GPT")
    words = ["fit", "--config", "net.yaml", *DOUBLE]
    ways = {"hand": MANUAL, "graph": ()}
    assert lm(*words, "--name", "whole")[0] == 0
    second = {"hand": "graph", "graph": "hand"}[first]
    assert lm(*words, *ways[first], "--name", "parts", *stop_with("StopAt", 7))[0] == 143
    code, _, err = lm(*words, *ways[second], "--name", "parts", "--ckpt_path", "last")
    assert code == 0, err
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-9)
    whole, parts = (load_network(Path(f"checkpoints/{name}/last.ckpt")).net for name in ("whole", "parts"))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["GPT", "GPT today"])
def test_accumulation_is_the_undivided_batch(lm, workplace: Path, name: str) -> None:
    recipe(name)
    text = yaml.safe_load(Path("net.yaml").read_text())
    text["model"]["init_args"]["net"]["init_args"].pop("dropout", None)
    text["data"] = TEXT_DATA
    Path("net.yaml").write_text(yaml.safe_dump(text))
    words = ["fit", "--config", "net.yaml", *DOUBLE, *MANUAL]
    assert lm(*words, "--name", "one")[0] == 0
    code, _, err = lm(*words, "--name", "four", "--trainer.accumulate_grad_batches", 4)
    assert code == 0, err
    assert losses("four") == pytest.approx(losses("one"), rel=1e-12)
    assert [row["step"] for row in table("four") if row["val/loss"]] == ["4", "8", "12"]


def test_several_steps_in_a_call_change_nothing(lm, workplace: Path) -> None:
    recipe("MLP")
    words = ["fit", "--config", "net.yaml", *MANUAL]
    assert lm(*words, "--name", "one")[0] == 0
    assert lm(*words, "--name", "four", "--model.init_args.steps_per_call", 4)[0] == 0
    a, b = (load_network(Path(f"checkpoints/{name}/last.ckpt")).net for name in ("one", "four"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_clipping_by_the_trainers_option(lm, workplace: Path) -> None:
    recipe("GPT", clip_norm=None)
    words = ["fit", "--config", "net.yaml", *DOUBLE, "--trainer.gradient_clip_val", 0.1]
    assert lm(*words, "--name", "graph")[0] == 0
    assert lm(*words, "--name", "hand", *MANUAL)[0] == 0
    assert lm(*words[:-1], 100, "--name", "free", *MANUAL)[0] == 0
    assert losses("hand") == pytest.approx(losses("graph"), rel=1e-9)
    assert losses("hand") != pytest.approx(losses("free"), rel=1e-6)


def test_bfloat16_products_float32_gradients(lm, workplace: Path) -> None:
    recipe("GPT today")
    words = ["fit", "--config", "net.yaml", "--trainer.precision", "bf16-mixed"]
    assert lm(*words, "--name", "graph")[0] == 0
    code, _, err = lm(*words, "--name", "hand", *MANUAL)
    assert code == 0, err
    assert losses("hand") == pytest.approx(losses("graph"), rel=2e-2)
    kinds = {value.dtype for value in load_network(Path("checkpoints/hand/last.ckpt")).net.parameters()}
    assert kinds == {torch.float32}


def test_an_audit_stops_a_wrong_rule(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("GPT")
    words = ["fit", "--config", "net.yaml", *MANUAL, "--model.init_args.audit_every", 5]
    code, _, err = lm(*words, "--name", "right")
    assert code == 0, err
    assert [row["step"] for row in table("right") if row.get("audit/relative")] == ["5", "10"]
    right = _rules[torch.nn.LayerNorm]

    def wrong(layer, grads, x):
        y, backward = right(layer, grads, x)
        return y, lambda dy: backward(dy) * 1.01

    monkeypatch.setitem(_rules, torch.nn.LayerNorm, wrong)
    code, _, err = lm(*words, "--name", "wrong")
    assert code == 1
    assert "step 5: the gradient by hand and autograd's disagree at " in err


def test_what_autograd_does_not_show_is_in_tensorboard(lm, workplace: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe("GPT")
    assert lm("fit", "--config", "net.yaml", *MANUAL, "--figures.every_n_steps", 4, "--name", "seen")[0] == 0
    events = EventAccumulator("logs/seen", size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert "gradients/dlogits" in tags["images"]
    assert {"residual_share/h.0.attn", "residual_share/h.0.mlp"} <= set(tags["scalars"])
    assert all(0 < event.value < 1 for event in events.Scalars("residual_share/h.0.mlp"))
    assert "gradients/h.0.attn.c_attn.weight" in tags["histograms"]
    assert "activations/h.0.mlp.c_fc" in tags["histograms"]  # hooks see passes by hand, too


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
def test_sixteen_bits_are_refused(lm, workplace: Path, precision: str) -> None:
    recipe("GPT")
    code, _, err = lm("fit", "--config", "net.yaml", *MANUAL, "--trainer.precision", precision)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and "loss scaler" in err and "use bf16-mixed" in err


def test_a_network_without_rule_is_refused(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("GPT")
    monkeypatch.delitem(_rules, GELU)
    code, _, err = lm("fit", "--config", "net.yaml", *MANUAL)
    assert code == 2
    assert "GELU: write a rule for it" in err and "lm/backprop/linear.py" in err


def ranks(*words: object, cwd: Path) -> None:
    """Run `lm` as two processes over gloo, as a cluster's launcher would."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (*words, "--trainer.devices", 2, "--trainer.strategy", "ddp")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    both = [start(*command, cwd=cwd, environment={**common, "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    ends = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], ends


@pytest.mark.parametrize("accumulate", often([2, 1]))
def test_two_ranks_are_one(lm, workplace: Path, accumulate: int) -> None:
    recipe("GPT today")
    text = yaml.safe_load(Path("net.yaml").read_text())
    text["data"] = {
        "class_path": "lm.data.TextData",
        "init_args": {"corpus": "text.txt", "block_size": 8, "batch_size": 8},
    }
    Path("net.yaml").write_text(yaml.safe_dump(text))
    words = ["fit", "--config", "net.yaml", *DOUBLE, *MANUAL]
    assert lm(*words, "--name", "one")[0] == 0
    ranks(*words, "--name", "two", "--trainer.accumulate_grad_batches", accumulate, cwd=workplace)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-10)
    one, two = (load_network(Path(f"checkpoints/{name}/last.ckpt")).net for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("module", often(["ManualLanguageModel", "LanguageModel"]))
def test_running_statistics_are_shared_before_evaluation(lm, workplace: Path, module: str) -> None:
    """Ranks see other batches, so their running statistics differ, until they are shared."""
    recipe("MLP")
    ranks(
        "fit",
        "--config",
        "net.yaml",
        "--model",
        f"lm.training.{module}",
        "--trainer.callbacks+",
        "tests.support.stop.SameStatistics",
        "--name",
        "two",
        cwd=workplace,
    )
    assert sorted(path.read_text() for path in workplace.glob("statistics-*")) == ["differ, then same"] * 2
    code, _, err = lm("fit", "--config", "net.yaml", "--name", "sharded", "--trainer.strategy", "fsdp2")
    assert code == 2 and err == "error: trainer.strategy fsdp2: MLP has BatchNorm, which is not sharded: use ddp\n"


THOUSAND = {  # the others take `make test-long`
    "64-true": (1e-9, ("MLP", "WaveNet", "LSTM", "GPT today")),
    "32-true": (1e-4, ("MLP", "GPT today")),
}


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        pytest.param(name, precision, tolerance, marks=pytest.mark.slow if name in often else pytest.mark.long)
        for precision, (tolerance, often) in THOUSAND.items()
        for name in NETWORKS
    ],
)
def test_a_thousand_losses_are_autograds(lm, workplace: Path, name: str, precision: str, tolerance: float) -> None:
    """By SGD, slowly, in batches of 64, with words about as long as the context.

    Where a true gradient is zero, as of a weight before BatchNorm whose inputs are all padding, AdamW makes a whole
    step of what rounding leaves; and at a high rate, trainings that differ by a rounding part exponentially.
    """
    recipe(name, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}})
    text = yaml.safe_load(Path("net.yaml").read_text())
    if name == "GPT today":  # addition falls off a plateau at a moment that rounding decides
        text["data"] = TEXT_DATA
        Path("net.yaml").write_text(yaml.safe_dump(text))
    lengths = 6 if "targets" in text["data"]["init_args"] else 9  # whole words must fit the context
    lines = ["".join(chr(97 + (7 * i + j * j) % 26) for j in range(2 + i % lengths)) for i in range(1200)]
    Path("words.txt").write_text("\n".join(lines))
    words = ["fit", "--config", "net.yaml", "--trainer.precision", precision, "--trainer.max_steps", 1000]
    words += ["--trainer.val_check_interval", 500, "--checkpoint.every_n_steps", 1000, "--figures.every_n_steps", 0]
    words += ["--data.init_args.batch_size", 64]
    assert lm(*words, "--name", "graph")[0] == 0
    assert lm(*words, "--name", "hand", *MANUAL)[0] == 0
    assert len(losses("hand")) == 1000
    assert losses("hand") == pytest.approx(losses("graph"), abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MLP", "GPT today", "Seq2Seq"])
def test_compiled_is_the_same(lm, workplace: Path, name: str) -> None:
    recipe(name)
    words = ["fit", "--config", "net.yaml", *DOUBLE, *MANUAL]
    assert lm(*words, "--name", "eager")[0] == 0
    code, _, err = lm(*words, "--name", "compiled", "--model.init_args.compile", "true")
    assert code == 0, err
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-9)
