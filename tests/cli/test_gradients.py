"""`lm gradients`, over every recipe."""

import ast
import json
from pathlib import Path

import pytest
import torch
import yaml

from lm.backprop import atomic
from lm.backprop.rules import _rules
from lm.models.feed_forward import GELU
from tests.conftest import ROOT
from tests.support.cases import often
from tests.support.mutants import Mutant
from tests.support.networks import recipe
from tests.support.recipes import CONFIGS, NET, SMALL, one_of_a_kind


@pytest.mark.parametrize(
    "config",
    often(CONFIGS, lambda config: one_of_a_kind(config) and config.stem not in ("bigram", "finetune", "addition")),
    ids=lambda path: str(path.relative_to(ROOT / "configs")),
)
def test_recipe(lm, data_for, config: Path) -> None:
    recipe = yaml.safe_load(config.read_text())
    stand_in = data_for(recipe)
    words = ["gradients", "--config", config, *stand_in, "--json"]
    if (
        recipe["model"]["init_args"].get("net", {}).get("init_args", {}).get("n_embd", 0) > 64
    ):  # minutes each at their size
        words += [word for name, value in SMALL.items() for word in (f"{NET}.{name}", value)]
        words += ["--data.init_args.batch_size", 2]
        if recipe["data"]["class_path"] == "lm.data.TextData":  # of others, an example has a length of its own
            words += ["--data.init_args.block_size", 16]
    code, out, err = lm(*words)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["ok"] is True
    assert len(result["rows"]) > 0 and all(row["relative"] <= 1e-10 for row in result["rows"])
    assert {"name", "shape", "exact", "approximate", "maxdiff", "relative"} == set(result["rows"][0])
    if not stand_in:  # on another corpus, a difference may step over the kink of a ReLU
        code, _, err = lm(*words, "--against", "differences")
        assert code == 0, err


@pytest.mark.parametrize("options", [
    ("--dtype", "float32"), ("--dtype", "bfloat16"), ("--mode", "eval"), ("--against", "differences"), ("--seed", 3),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", often(["MLP", "GPT today", "GPT", "Seq2Seq"], 2))
def test_options(lm, workplace: Path, name: str, options: tuple[str, ...]) -> None:
    recipe(name)
    code, out, err = lm("gradients", "--config", "net.yaml", *options)
    assert code == 0, out + err
    assert "gradients by hand agree with" in out


@pytest.mark.parametrize("bessel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_lectures_table(lm, workplace: Path, bessel: bool, bias: bool) -> None:
    recipe("MLP")
    text = yaml.safe_load(Path("net.yaml").read_text())
    text["model"]["init_args"]["net"]["init_args"] = {"n_hidden": 64, "bessel": bessel, "bias": bias}
    text["data"]["init_args"]["batch_size"] = 32
    Path("net.yaml").write_text(yaml.safe_dump(text))
    code, out, err = lm("gradients", "--config", "net.yaml", "--level", "atomic", "--json")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["name"] for row in rows] == [name for name in atomic.GRADIENTS if bias or name != "b1"]
    assert all(row["relative"] <= 1e-10 for row in rows)


SOURCE = Path(atomic.__file__).read_text()
ZERO = ("dlogit_maxes", "db1")  # no factor breaks these
LINES = [
    (node.name, ast.unparse(line))
    for node in ast.parse(SOURCE).body
    if isinstance(node, ast.FunctionDef) and node.name[1:] in atomic.GRADIENTS and node.name not in ZERO
    for line in node.body[1:]
]
BREAKS = {
    "/ n": "* n",
    "/ m": "* m",
    "1 / len": "2 / len",
    " * ": " + ",
    ".sum(": ".mean(",
    ".sum_to_size(bngain.shape)": ".mean(0)",
    " + ": " - ",
    "-d": "d",
    "** 3": "** 2",
    ".mT": "",
    "(1 -": "(2 -",
}


@pytest.mark.parametrize(("function", "line"), LINES)
def test_a_wrong_line_of_the_table_is_seen(function: str, line: str) -> None:
    """Every line of the atomic backward pass that has something to break, broken."""
    from lm.models import MLP

    torch.manual_seed(1)
    net = MLP(7, 3, n_embd=2, n_hidden=5, bias=True, bessel=True).double()
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    tokens, targets = torch.randint(7, (6, 3)), torch.randint(7, (6,))
    assert all(row.approximate for row in atomic.against_autograd(net, tokens, targets))
    tried = 0
    for old, new in BREAKS.items():
        if old not in line:
            continue
        space: dict = {"__name__": "broken"}
        changed = Mutant(f"atomic:{function}", line, line.replace(old, new, 1), f"{old} is {new}").changed(SOURCE)
        exec(compile(changed, "broken", "exec"), space)
        try:
            good = all(row.approximate for row in space["against_autograd"](net, tokens, targets))
        except (RuntimeError, KeyError):
            good = False
        assert not good, (line, old, new)
        tried += 1
    if not tried:
        pytest.skip("nothing in this line that these changes break")


def test_disagreement_is_exit_1(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("GPT")
    monkeypatch.setitem(_rules, torch.nn.LayerNorm, lambda layer, grads, x: (layer(x), lambda dy: dy))
    code, out, err = lm("gradients", "--config", "net.yaml", "--json")
    assert code == 1
    assert json.loads(out.splitlines()[-1])["ok"] is False
    assert "disagree with autograd (one batch; 4 micro-batches; 2 ranks): " in err and "h.0.ln_1.weight" in err
    untied = ("--model.init_args.net.init_args.tie_weights", "false")
    lines = lm("gradients", "--config", "net.yaml", *untied)[1].splitlines()
    assert lines[0].split() == ["gradient", "shape", "agrees", "difference", "relative"]
    said = {line.split()[0]: line.split()[-3] for line in lines[1:]}
    assert said["h.0.ln_1.weight"] == "NO" and said["lm_head.weight"] == "yes"


def test_a_compiled_graph_is_compared_where_training_has_one(
    lm, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself is tried by a slow test; here a wrong one stands in."""
    from lm.training import by_hand

    recipe("GPT")

    def wrong() -> by_hand.Compiled:
        def compiled(*arguments: object) -> tuple:
            loss, found = by_hand._functional(*arguments)
            return loss, [None if gradient is None else 1.01 * gradient for gradient in found]

        return compiled

    monkeypatch.setattr("lm.cli.gradients.compile_pass", wrong)
    assert lm("gradients", "--config", "net.yaml")[0] == 0
    code, _, err = lm("gradients", "--config", "net.yaml", "--model.init_args.compile", "true")
    assert code == 1 and "disagree with autograd (one batch; 4 micro-batches): " in err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_what_the_compiler_makes_agrees(lm, workplace: Path, dtype: str) -> None:
    """With dropout: the graph draws the masks that autograd draws."""
    recipe("GPT")
    words = ("--dtype", dtype, "--model.init_args.compile", "true")
    code, out, err = lm("gradients", "--config", "net.yaml", *words)
    assert code == 0, out + err


def test_a_rule_that_fails_is_one_line(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("GPT")
    monkeypatch.setitem(_rules, torch.nn.LayerNorm, lambda layer, grads, x: (layer(x), lambda dy: dy[0, 0, 0, 0]))
    code, _, err = lm("gradients", "--config", "net.yaml")
    assert code == 1 and len(err.strip().splitlines()) == 1 and "could not be found: IndexError" in err


@pytest.mark.parametrize(("words", "says"), [
    (("--level", "atomic"), "with n_layer 1 and batch_norm: use --level fused\n"),
    (("--level", "atomic", "--dtype", "bfloat16"), "--level atomic is for --mode train"),
    (("--dtype", "float8"), "dtype"),
    (("--against", "differences", "--dtype", "float32"), "--against differences needs --dtype float64"),
])  # fmt: skip
def test_bad_input(lm, workplace: Path, words: tuple[str, ...], says: str) -> None:
    recipe("GPT")
    code, _, err = lm("gradients", "--config", "net.yaml", *words)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1


def test_a_layer_without_rule(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe("GPT")
    monkeypatch.delitem(_rules, GELU)
    code, _, err = lm("gradients", "--config", "net.yaml")
    assert code == 2 and "GELU: write a rule for it" in err


def test_values_are_shown_as_the_lecture_looks_at_them(lm, workplace: Path) -> None:
    recipe("MLP")
    text = yaml.safe_load(Path("net.yaml").read_text())
    text["model"]["init_args"]["net"]["init_args"] = {"n_hidden": 16, "bias": True, "bessel": True}
    Path("net.yaml").write_text(yaml.safe_dump(text))
    words = ["gradients", "--config", "net.yaml", "--level", "atomic", "--values"]
    code, out, err = lm(*words, "--tensor", "dlogits", "--json")
    assert code == 0, err
    (one,) = json.loads(out.splitlines()[-1])["values"]
    assert one["name"] == "logits" and one["shape"] == [8, 27] and len(one["gradient_corner"]) == 4
    assert 0 < one["gradient_largest"] <= 1 / 8
    rows = [line.split() for line in err.splitlines() if line.endswith("the probability - 1")]
    assert len(rows) == 1 and float(rows[0][1]) - 1 == pytest.approx(float(rows[0][2]), abs=2e-4)
    code, out, err = lm(*words, "--json")
    found = {one["name"]: one for one in json.loads(out.splitlines()[-1])["values"]}
    assert list(found) == list(atomic.GRADIENTS)
    assert found["logit_maxes"]["gradient_largest"] < 1e-15 < found["h"]["gradient_largest"]  # float64
    code, _, err = lm("gradients", "--config", "net.yaml", "--values", "--tensor", "nothing")
    assert code == 2 and "--tensor nothing: there is none of that name: say one of wte.weight" in err
    code, _, err = lm("gradients", "--config", "net.yaml", "--tensor", "wte.weight")
    assert code == 2 and "is for --values" in err


def test_values_of_parameters_are_the_gradients(lm, workplace: Path) -> None:
    recipe("GPT")
    code, out, err = lm("gradients", "--config", "net.yaml", "--values", "--tensor", "wte.weight", "--json")
    assert code == 0, err
    (one,) = json.loads(out.splitlines()[-1])["values"]
    assert one["gradient_norm"] >= one["gradient_largest"] > 0
    assert f"norm {one['gradient_norm']:.3e}" in err
