"""The checks can fail: each rule, broken in one place, is rejected by them."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lm.models.layers import BatchNorm
from lm.training import audit
from tests.backprop.test_rules import (
    LAYERS,
    NETWORKS,
    T,
    V,
    assert_same,
    batch,
    make,
    test_attention_is_right_at_every_length,
    test_gradients_add_up_and_frozen_parameters_have_none,
    test_layer_against_autograd,
    test_loss_and_head_in_chunks,
)
from tests.conftest import RECIPE
from tests.support.networks import recipe

MUTANTS = [
    ("linear", "rows.mT @ rows_of(x).to", "2 * rows.mT @ rows_of(x).to", "linear: dW doubled"),
    ("linear", "grads.add(layer.bias, precise(rows).sum(0))", "grads.add(layer.bias, rows.mean(0))", "linear: db mean"),
    ("linear", "return dy @ layer.weight  #", "return dy @ layer.weight.flip(0)  #", "linear: dx of a permuted product"),
    ("linear", "summed = precise(dy).sum(0)", "summed = precise(dy)[0]", "positions: sum over the batch forgotten"),
    ("linear", "(dy @ x[:, :, window].mT).sum(0)", "(dy @ x[:, :, window].mT)[0]", "convolution: dW of one sequence"),
    ("linear", "dx[:, :, window] += tap.mT @ dy", "dx[:, :, window] = tap.mT @ dy", "convolution: += forgotten"),
    ("linear", "k * dilation, k * dilation + T", "k, k + T", "convolution: dilation forgotten"),
    ("linear", "precise(dy).sum((0, 2))", "precise(dy).mean((0, 2))", "conv1d: db averaged"),
    ("linear", "dy.reshape(x.shape)", "dy.reshape(x.shape).flip(1)", "flatten: places exchanged"),
    ("linear", "dy * kept * (1 / (1 - p))", "dy * kept", "dropout: scale forgotten"),
    ("linear", "dy = backwards.pop()(dy)", "dy = backwards.pop(0)(dy)", "sequential: order not reversed"),
    ("rules", "known.scatter_add_(", "known.scatter_(", "embedding: += forgotten for a token seen twice"),
    ("rules", "known += gradient", "known = gradient", "tied weights: += forgotten"),
    ("activations", "dy - dy * y * y", "dy - dy * y", "tanh: square forgotten"),
    ("activations", "dy * y * (1 - y)", "dy * (1 - y)", "sigmoid: factor y dropped"),
    ("activations", "(x > 0).to(x.dtype)", "torch.ones_like(x)", "relu: gradient where it is off"),
    ("activations", "return positive * positive, 2 * positive", "return positive * positive, positive", "squared relu: factor 2"),
    ("activations", "below + x * density", "below + density", "gelu: factor x"),
    ("activations", "square.mul_(3 * b)", "square.mul_(2 * b)", "gelu tanh: wrong power"),
    ("activations", "s + value * (1 - s)", "s + value", "silu: factor 1 - σ"),
    ("norms", "- int(layer.bessel)\n", "\n", "batch norm: Bessel's correction forgotten in dx"),
    ("norms", "return (dy - sum_1 / n - ", "return (dy - ", "batch norm: term of μ dropped"),
    ("norms", " - normal * (sum_x / m)) * scale", ") * scale", "batch norm: term of v dropped"),
    ("norms", "examples(dy * normal).sum(0)", "(dy * normal).sum(0)", "batch norm: wrong axis"),
    ("norms", "return dy * scale", "return dy * r", "batch norm, eval: γ forgotten"),
    ("norms", "addcmul(mean_g.neg(), dy", "addcmul(mean_g, dy", "layer norm: sign of the term of μ"),
    ("norms", "        return dx.addcmul_(normal, mean_gx, value=-1).mul_(r)", "        return dx.mul_(r)", "layer norm: v"),
    ("norms", "grads.add(layer.bias, rows_of(dy).sum(0))", "grads.add(layer.bias, rows_of(product).sum(0))", "LN: dβ"),
    ("norms", "_rowwise(product, layer.weight / C)", "_rowwise(product, layer.weight)", "rms norm: mean is a sum"),
    ("attention", "p).unsqueeze(-1)", "p).unsqueeze(-2)", "softmax: wrong axis"),
    ("attention", "return dp.sub_(inner).mul_(p)", "return dp.mul_(p)", "softmax: subtraction dropped"),
    ("attention", "torch.bmm(dscores.mT, q_)", "torch.bmm(dscores, q_)", "attention: dk not transposed"),
    ("attention", "dv = torch.bmm(used.mT, dy_)", "dv = torch.bmm(weights.flatten(0, 1).mT, dy_)", "attention: dropout forgotten in dv"),
    ("attention", "dweights = backward_drop(", "dweights = (", "attention: dropout forgotten in dP"),
    ("attention", "dy_, beta=old)", "dy_, beta=0)", "causal attention: += over blocks forgotten"),
    ("attention", "_future(scores, start)", "_future(scores, 0)", "causal attention: later blocks masked as the first"),
    ("attention", "k_) * (1 / math.sqrt(D))", "k_)", "attention: 1/√D dropped in dq"),
    ("attention", "unflatten(1, (-1, group)).sum(2)", "unflatten(1, (-1, group))[:, :, 0]", "shared keys: one copy alone"),
    ("attention", "torch.cat([second, -first]", "torch.cat([-second, first]", "rotary: turned on instead of back"),
    ("attention", "q, k, backward_turn =", "_, _, backward_turn =", "rotary and QK-norm not applied"),
    ("attention", "+ backward_k(dk) + backward_v(dv)", "+ backward_k(dk)", "head: values forgotten"),
    ("attention", "join_heads(dk), join_heads(dv)", "join_heads(dv), join_heads(dk)", "cross-attention: exchanged"),
    ("attention", "head_size).masked_fill(blind, 0.0)\n        dq", "head_size)\n        dq", "cross-attention: the blind"),
    ("attention", "backward_fc(slope.mul_(da))", "backward_fc(slope.mul_(da).abs_())", "MLP: sign lost"),
    ("attention", "backward_up(value.mul_(da))", "backward_up(value)", "swiglu: da forgotten"),
    ("attention", "slope.mul_(da).mul_(up)", "slope.mul_(da)", "swiglu: up forgotten"),
    ("attention", "* (positive > 0))", ")", "single layer: relu forgotten"),
    ("loss", "-weights.to(dlogits.dtype))", "-2 * weights.to(dlogits.dtype))", "cross-entropy: onehot doubled"),
    ("loss", "targets != ignore_index).unsqueeze(1)", "targets != -1).unsqueeze(1)", "cross-entropy: ignored count"),
    ("loss", "total / count, drows.view", "total / len(flat), drows.view", "cross-entropy: divided by all"),
    ("loss", "dlogits *= 1 - (logits / soft_cap).square()", "pass", "soft cap: derivative forgotten"),
    ("loss", "part if dweight is None else dweight.add_(part)", "part", "head: earlier chunks forgotten"),
    ("networks", "df = dz * gate * (1 - filtered * filtered)", "df = dz * (1 - filtered * filtered)", "gate forgotten"),
    ("networks", "dg = dz * filtered * gate * (1 - gate)", "dg = dz * filtered * (1 - gate)", "σ' wrong"),
    ("networks", "return residual(grads, block, dstream, dbranch)", "return dbranch", "gated block: stream forgotten"),
    ("networks", "* (summed > 0)).mT", ").mT", "gated wavenet: relu forgotten"),
    ("networks", "residual(grads, f, dy, dbranch) if layer.residual else dbranch", "dbranch", "block: residual forgotten"),
    ("networks", "dy = backward_norm(dy)", "pass", "post-norm forgotten"),
    ("networks", "backward_ln_1(dx + dmemory)", "backward_ln_1(dx)", "encoder: keys and values forgotten"),
    ("networks", "dmemory = dmemory + more", "dmemory = more", "encoder: one decoder block alone"),
    ("networks", "backward_wte(dtarget + dsource)", "backward_wte(dtarget)", "seq2seq: source's embedding forgotten"),
    ("networks", "dkernel.mT.flatten(1)", "dkernel.flatten(1)", "dense wavenet: taps not moved back"),
]  # fmt: skip


UNTIED = ("--model.init_args.net.init_args.tie_weights", "false")  # else the head is the first to add to the table
RULES, STEP, REDUCED = "backprop.rules", "training.by_hand", "training.distributed.reduction"
DIVISION = "training.division"
ACCUMULATION = [
    (RULES, "known.scatter_add_(", "known.scatter_(", "a token seen twice counts once"),
    (RULES, "            known += gradient", "            self.keep(parameter, gradient)", "the last one wins"),
    (RULES, "            known += gradient", "            pass", "the first one wins"),
    (RULES, "        if known is None:\n            known = torch.zeros", "        if True:\n            known = torch.zeros", "table anew"),
    (RULES, "torch.zeros_like(table)", "torch.ones_like(table)", "a table that begins at one"),
    (RULES, "            parameter.grad = None", "            pass", "the step before is not forgotten"),
    (STEP, "self.grads.begin(self.parameters)", "pass", "a step is not begun"),
    (DIVISION, "(targets.numel() * self.micro_batches)", "targets.numel()", "not divided by micro-batches"),
    (DIVISION, "(targets.numel() * self.micro_batches)", "(targets.numel() * self.micro_batches**2)", "divided by them twice"),
    (STEP, "(targets, self.parameters[0].dtype)\n", "(targets, self.parameters[0].dtype) * last\n", "a micro-batch lost"),
    (STEP, "        scale = self.", "        self.begin()\n        scale = self.", "all but one lost"),
    (STEP, "for parameter, gradient in zip(self", "for parameter, gradient in () and zip(self", None),  # compiled alone
    (DIVISION, "positions * self.ranks / max(1, count)", "1.0", "ignored targets count"),
    (REDUCED, "torch.mul(gradient, 1 / self.world_size, out=part)", "part.copy_(gradient)", "a first gradient not divided"),
    (REDUCED, "part.add_(gradient, alpha=1 / self.world_size)", "part.add_(gradient)", "a later one not divided"),
    (REDUCED, "part.add_(gradient, alpha=1 / self.world_size)", "part.copy_(gradient / self.world_size)", "overwritten"),
    (REDUCED, "part.scatter_add_(", "part.scatter_(", "ranks: a token seen twice counts once"),
    (REDUCED, "rows.to(table.dtype) / self.world_size", "rows.to(table.dtype)", "rows not divided"),
    (REDUCED, "            part.zero_()\n        part", "            pass\n        part", "rows of the step before"),
    (REDUCED, "self.empty = set(self.parts)", "self.empty = set()", "ranks: the step before is not forgotten"),
    (REDUCED, "= distributed.all_reduce(self.buckets[number], group=self.group, async_op=True)", "= None", "not reduced"),
    (REDUCED, "        if not self.reducing:", "        if False:", "reduced after each micro-batch"),
    (REDUCED, "uses[id(p)] for p in group", "1 for p in group", "a tied weight reduced before it is whole"),
    (DIVISION, "positions * self.ranks / max(1, count)", "positions / max(1, count)", "divided by ranks twice"),
]  # fmt: skip


@contextmanager
def broken(module: str, old: str, new: str) -> Iterator[None]:
    """Put a changed rule where the right one is, wherever it is used."""
    target = importlib.import_module(f"lm.{module}" if "." in module else f"lm.backprop.{module}")
    source = Path(str(target.__file__)).read_text()
    assert source.count(old) >= 1, f"{module} no longer has: {old}"
    users = [m for name, m in sys.modules.items() if name.startswith(("lm.", "tests.backprop."))]

    def load(text: str) -> None:
        before = dict(vars(target))
        exec(compile(text, str(target.__file__), "exec"), vars(target))
        for user in users:
            for name, value in list(vars(user).items()):
                if name in before and value is before[name] and callable(value):
                    setattr(user, name, vars(target)[name])

    registry = importlib.import_module("lm.backprop.rules")._rules
    rules = dict(registry)
    changed = source.replace(old, new)
    if module.endswith("rules"):  # its registry must outlive the change
        changed, source = (text.replace("_rules: dict[type, Rule] = {}", "") for text in (changed, source))
    try:
        load(changed)
        yield
    finally:
        load(source)
        registry.update(rules if module.endswith("rules") else {})


def checks() -> Iterator[object]:
    """All that is checked of layers and networks in the other file, until something is wrong."""
    for name in LAYERS:
        yield test_layer_against_autograd(name)
    for cap in (None, 3.0):
        with pytest.MonkeyPatch.context() as patch:
            yield test_loss_and_head_in_chunks((2, 3), cap, patch)
    for name in NETWORKS:
        for training in (True, False):
            net = make(name).train(training)
            yield assert_same(net, *batch(net, 5, ignored=True))
    yield test_attention_is_right_at_every_length(300)
    yield test_gradients_add_up_and_frozen_parameters_have_none()


def verdict() -> str:
    try:
        for _ in checks():
            pass
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        return f"rejected: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}"
    return "accepted"


def test_the_checks_accept_the_rules_and_reject_every_mutant() -> None:
    assert verdict() == "accepted"
    verdicts = {}
    for module, old, new, name in MUTANTS:
        with broken(module, old, new):
            verdicts[f"{module}: {name}"] = verdict()
    width = max(map(len, verdicts))
    print(*(f"{name:<{width}}  {text}" for name, text in verdicts.items()), sep="\n")
    assert [name for name, text in verdicts.items() if text == "accepted"] == []
    torch.manual_seed(0)
    assert verdict() == "accepted"  # all is as before


def sequence(layer: nn.Module, shape: tuple[int, ...]) -> nn.Sequential:
    """Put a layer between a table and a head, so that it is a network."""
    with torch.no_grad():
        channels = layer(torch.zeros(shape)).shape[-1]
    return nn.Sequential(nn.Embedding(V, shape[-1]), layer, nn.Linear(channels, V))


def checked(dtype: torch.dtype) -> Iterator[str]:
    """Yield what `lm gradients` would find wrong, network after network."""
    torch.manual_seed(1)
    layers = [sequence(build(), shape) for build, shape in LAYERS.values()]
    nets = [make(name, torch.float32) for name in (*FIRST, *(name for name in NETWORKS if name not in FIRST))]
    for net in [*nets[: len(FIRST)], *layers, *nets[len(FIRST) :]]:
        if isinstance(net, nn.Sequential):
            time = 6 if isinstance(net[1], nn.Conv1d) else T - 3
            tokens = torch.randint(V, (4, 8, time))
            with torch.no_grad():
                kind = net(tokens[0]).shape[:-1]
            batches = list(zip(tokens, torch.randint(V, (4, *kind)), strict=True))
        else:
            batches = [batch(net, 5, ignored=True) for _ in range(4)]
        for mode in (True, False) if any(isinstance(part, BatchNorm) for part in net.modules()) else (True,):
            low = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
            with low:
                tables = audit.check(
                    net.train(mode).to(torch.float64 if dtype == torch.float64 else torch.float32), batches
                )
            for way, table in tables.items():
                yield from (f"{way}: {row.name}" for row in table if not row.approximate)


FIRST = ("gpt today", "mlp by hand", "gated wavenet", "wavenet dense", "seq2seq", "gpt separate", "gpt post norm")


def found(dtype: torch.dtype) -> str | None:
    """Return the first thing that is found wrong."""
    try:
        return next(checked(dtype), None)
    except Exception as error:  # a wrong rule may raise anything; `lm gradients` says that, too
        return type(error).__name__


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_checker_finds_every_mutant_in_each_arithmetic(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs long sequences, many logits or ignored targets has them."""
    monkeypatch.setattr("lm.backprop.attention.BLOCK", 3)
    monkeypatch.setattr("lm.backprop.loss.CHUNK", 4 * V)
    assert found(dtype) is None
    wrong = {}
    for module, old, new, name in [*MUTANTS, *ACCUMULATION]:
        if name is not None:
            with broken(module, old, new):
                monkeypatch.setattr("lm.backprop.attention.BLOCK", 3)
                monkeypatch.setattr("lm.backprop.loss.CHUNK", 4 * V)
                wrong[f"{module}: {name}"] = found(dtype)
    print(*wrong.items(), sep="\n")
    assert [name for name, what in wrong.items() if what is None] == []


@pytest.mark.parametrize(
    ("module", "old", "new", "name"), [one for one in ACCUMULATION if one[3]], ids=lambda v: str(v)[:40]
)
def test_lm_gradients_finds_every_wrong_sum(lm, workplace: Path, module: str, old: str, new: str, name: str) -> None:
    with broken(module, old, new):
        code, _, err = lm("gradients", "--config", "tiny.yaml", "--json", *UNTIED * ("table" in old or "zero_" in old))
    assert code == 1, name
    assert "disagree with autograd (" in err or "could not be found" in err


def test_lm_gradients_finds_them_in_bfloat16_too(lm, workplace: Path) -> None:
    recipe("MLP")
    for words in ((), ("--model.init_args.net.init_args.bessel", "true")):
        assert lm("gradients", "--config", "net.yaml", "--dtype", "bfloat16", *words)[0] == 0
    for module, old, new, _ in [one for one in MUTANTS if "bessel" in one[1]] + ACCUMULATION[:1]:
        with broken(module, old, new):
            code, _, err = lm("gradients", "--config", "net.yaml", "--dtype", "bfloat16", *words)
        assert code == 1 and "in float64" in err, new


@pytest.mark.parametrize(
    ("module", "old", "new", "name"),
    [o for o in ACCUMULATION if o[0] in (RULES, STEP) and o[3]],
    ids=lambda v: str(v)[:40],
)
def test_an_audit_finds_a_wrong_sum(lm, workplace: Path, module: str, old: str, new: str, name: str) -> None:
    words = ["--model", "lm.training.ManualLanguageModel", "--model.init_args.audit_every", 2]
    words += ["--trainer.accumulate_grad_batches", 2, "--trainer.max_steps", 3]
    with broken(module, old, new):
        code, _, err = lm("fit", "--config", "tiny.yaml", *words, *UNTIED * ("table" in old))
    assert code == 1, name
    assert "step 2: the gradient by hand and autograd's disagree at " in err


LOSS_ALONE = [  # right gradients of a loss that is wrong
    ("Bigram", "loss", "total / count, drows.view", "total / len(flat), drows.view", ()),
    ("Bigram", "loss", "total / count, drows.view", "total / len(flat), drows.view", ("--dtype", "bfloat16")),
    ("MLP", "loss", "total / count, (drows[0]", "total / len(flat), (drows[0]", ()),
    ("MLP", "loss", "return total / count, (", "return 1.01 * total / count, (", ("--against", "differences")),
    ("MLP", STEP, "return loss * scale * self.division.micro_batches", "return loss * scale", ()),
    ("MLP", DIVISION, "return total / max(1, count)", "return total / positions", ()),
]


@pytest.mark.parametrize(("network", "module", "old", "new", "options"), LOSS_ALONE, ids=lambda v: str(v)[:30])
def test_a_wrong_loss_is_a_row(
    lm, workplace: Path, network: str, module: str, old: str, new: str, options: tuple[str, ...]
) -> None:
    if network == "Bigram":  # its logits are whole
        model = {"class_path": "lm.training.LanguageModel", "init_args": {"net": {"class_path": "lm.models.Bigram"}}}
        Path("net.yaml").write_text(yaml.safe_dump(RECIPE | {"model": model}))
    else:
        recipe(network)
    words = ("gradients", "--config", "net.yaml", "--json", *options)
    code, out, err = lm(*words)
    assert code == 0, err
    first = json.loads(out.splitlines()[-1])["rows"][0]
    assert first["name"] == "loss" and first["shape"] == []
    with broken(module, old, new):
        code, out, err = lm(*words)
    assert code == 1 and "1 of " in err and err.strip().endswith(": loss"), err
    assert [row["name"] for row in json.loads(out.splitlines()[-1])["rows"] if not row["approximate"]] == ["loss"]
