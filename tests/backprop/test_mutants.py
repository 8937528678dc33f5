"""The checks can fail: each rule, broken in one place, is rejected by them."""

import ast
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lm.models.layers import BatchNorm
from lm.training import audit
from tests.conftest import RECIPE
from tests.support.cases import often
from tests.support.gradients import (
    LAYERS,
    NETWORKS,
    T,
    V,
    assert_attention,
    assert_gradients_add_up,
    assert_layer,
    assert_loss_and_head,
    assert_same,
    batch,
    make,
    seed,
)
from tests.support.mutants import Mutant, broken
from tests.support.networks import recipe

MUTANTS = [
    Mutant("linear", "rows.mT @ rows_of(x).to(rows.dtype)", "2 * rows.mT @ rows_of(x).to(rows.dtype)", "linear: dW doubled"),
    Mutant("linear", "grads.add(layer.bias, precise(rows).sum(0))", "grads.add(layer.bias, rows.mean(0))", "linear: db mean"),
    Mutant("linear", "dy @ layer.weight", "dy @ layer.weight.flip(0)", "linear: dx of a permuted product"),
    Mutant("linear", "precise(dy).sum(0)", "precise(dy)[0]", "positions: sum over the batch forgotten"),
    Mutant("linear", "(dy @ x[:, :, window].mT).sum(0)", "(dy @ x[:, :, window].mT)[0]", "convolution: dW of one sequence"),
    Mutant("linear", "dx[:, :, window] += tap.mT @ dy", "dx[:, :, window] = tap.mT @ dy", "convolution: += forgotten"),
    Mutant("linear", "slice(k * dilation, k * dilation + T)", "slice(k, k + T)", "convolution: dilation forgotten"),
    Mutant("linear", "precise(dy).sum((0, 2))", "precise(dy).mean((0, 2))", "conv1d: db averaged"),
    Mutant("linear", "dy.reshape(x.shape)", "dy.reshape(x.shape).flip(1)", "flatten: places exchanged"),
    Mutant("linear", "lambda dy: dy * mask", "lambda dy: dy", "dropout: all of dy"),
    Mutant("linear", "dy * kept * (1 / (1 - p))", "dy * kept", "torch's dropout: scale forgotten"),
    Mutant("linear", "backwards.pop()(dy)", "backwards.pop(0)(dy)", "sequential: order not reversed"),
    Mutant("rules", "known.scatter_add_", "known.scatter_", "embedding: += forgotten for a token seen twice"),
    Mutant("rules", "known += gradient", "known = gradient", "tied weights: += forgotten"),
    Mutant("activations", "dy - dy * y * y", "dy - dy * y", "tanh: square forgotten"),
    Mutant("activations", "dy * y * (1 - y)", "dy * (1 - y)", "sigmoid: factor y dropped"),
    Mutant("activations", "(x > 0).to(x.dtype)", "torch.ones_like(x)", "relu: gradient where it is off"),
    Mutant("activations", "2 * positive", "positive", "squared relu: factor 2"),
    Mutant("activations", "below + x * density", "below + density", "gelu: factor x"),
    Mutant("models.parts", "square.mul_(3 * b)", "square.mul_(2 * b)", "gelu tanh: wrong power"),
    Mutant("activations", "s + value * (1 - s)", "s + value", "silu: factor 1 - σ"),
    Mutant("norms", "n - int(layer.bessel)", "n", "batch norm: Bessel's correction forgotten in dx"),
    Mutant("norms", "dy - sum_1 / n - normal * (sum_x / m)", "dy - normal * (sum_x / m)", "batch norm: term of μ dropped"),
    Mutant("norms", "dy - sum_1 / n - normal * (sum_x / m)", "dy - sum_1 / n", "batch norm: term of v dropped"),
    Mutant("norms", "examples(dy * normal).sum(0)", "(dy * normal).sum(0)", "batch norm: wrong axis"),
    Mutant("norms", "dy * scale", "dy * r", "batch norm, eval: γ forgotten"),
    Mutant("norms:layer_norm", "(dy @ gamma).neg_()", "(dy @ gamma)", "layer norm: sign of the term of μ"),
    Mutant("norms:layer_norm", "dx.addcmul_(normal, (product @ gamma).unsqueeze(-1), value=-1).mul_(r)", "dx.mul_(r)", "layer norm: v"),
    Mutant("norms:layer_norm", "totals[1] += dy.sum(0)", "totals[1] += product.sum(0)", "layer norm: dβ"),
    Mutant("norms:layer_norm", "totals[0] += product.sum(0)", "totals[0] = product.sum(0)", "layer norm: earlier rows forgotten"),
    Mutant("models.parts:rms_norm_backward", "weight.to(r.dtype) / normal.shape[-1]", "weight.to(r.dtype)", "rms norm: mean is a sum"),
    Mutant("models.parts:rms_norm_backward", "total.add_(product.sum(0))", "total.copy_(product.sum(0))", "rms norm: earlier rows forgotten"),
    Mutant("models.parts:rms_norm", "normal.copy_(x)", "normal.copy_(y)", "rms norm: not y x̂"),
    Mutant("attention", "dp.sub_(inner.unsqueeze(-1)).mul_(p)", "dp.mul_(p)", "softmax: subtraction dropped"),
    Mutant("attention", "dp.sub_(inner.unsqueeze(-1)).mul_(p)", "dp.sub_(inner.unsqueeze(-1))", "softmax: p forgotten"),
    Mutant("attention:attend", "torch.linalg.vecdot(dy_, y)", "torch.linalg.vecdot(y, y)", "attention: inner product of y alone"),
    Mutant("attention:attend", "torch.bmm(dscores.mT, q_)", "torch.bmm(dscores, q_)", "attention: dk not transposed"),
    Mutant("attention:causal_self_attention", "dv = backward_keys(dv)", "pass", "attention: dropped keys forgotten in dv"),
    Mutant("attention", "torch.bmm(used.mT, dy_)", "torch.bmm(weights.mT, dy_)", "attention: dropout forgotten in dv"),
    Mutant("attention", "backward_drop(torch.bmm(dy_, v_.mT))", "torch.bmm(dy_, v_.mT)", "attention: dropout forgotten in dP"),
    Mutant("attention", "place.add_(part)", "place.copy_(part)", "causal attention: += over blocks forgotten"),
    Mutant("attention", "scores[:, :, start:]", "scores[:, :, : scores.shape[1]]", "causal attention: later blocks masked as the first"),
    Mutant("attention", "torch.linalg.vecdot(dy, y)", "torch.linalg.vecdot(dy, v)", "causal attention: v for y"),
    Mutant("attention", "torch.bmm(dscores, k_).mul_(scale)", "torch.bmm(dscores, k_)", "causal attention: 1/√D dropped in dq"),
    Mutant("attention", "((dk, torch.bmm(dscores.mT, q_)), (dv, torch.bmm(weights.mT, dy_)))", "((dk, torch.bmm(dscores.mT, q_)), (dv, torch.bmm(dscores.mT, dy_)))", "causal attention: dv by dS"),
    Mutant("attention", "torch.bmm(dscores, k_) * (1 / math.sqrt(D))", "torch.bmm(dscores, k_)", "attention: 1/√D dropped in dq"),
    Mutant("attention", "part.unflatten(1, (-1, group)).sum(2)", "part.unflatten(1, (-1, group))[:, :, 0]", "shared keys: one copy alone"),
    Mutant("attention", "turned(dy, cos, -sin)", "turned(dy, cos, sin)", "rotary: turned on instead of back"),
    Mutant("attention", "q, k, backward_turn = _norm_and_turn(attn, grads, q, k)", "_, _, backward_turn = _norm_and_turn(attn, grads, q, k)", "rotary and QK-norm not applied"),
    Mutant("attention", "backward_q(dq) + backward_k(dk) + backward_v(dv)", "backward_q(dq) + backward_k(dk)", "head: values forgotten"),
    Mutant("attention", "[join_heads(dk), join_heads(dv)]", "[join_heads(dv), join_heads(dk)]", "cross-attention: exchanged"),
    Mutant("attention", "split_heads(backward_proj(backward_drop(dy)), head_size).masked_fill(blind, 0.0)", "split_heads(backward_proj(backward_drop(dy)), head_size)", "cross-attention: the blind"),
    Mutant("attention", "torch.mul(slope, da, out=da)", "torch.mul(slope, da.abs(), out=da)", "MLP: sign lost"),
    Mutant("attention:mlp", "a.copy_(value)", "a.copy_(h)", "MLP: a before its activation"),
    Mutant("attention", "dup.copy_(value.mul_(da))", "dup.copy_(value)", "swiglu: da forgotten"),
    Mutant("attention", "a.copy_(value * up)", "a.copy_(value)", "swiglu: up forgotten in dW₂"),
    Mutant("attention", "slope.mul_(da).mul_(up)", "slope.mul_(da)", "swiglu: up forgotten"),
    Mutant("attention", "backward_drop(dy) * (positive > 0)", "backward_drop(dy)", "single layer: relu forgotten"),
    Mutant("loss", "-weights.to(dlogits.dtype)", "-2 * weights.to(dlogits.dtype)", "cross-entropy: onehot doubled"),
    Mutant("loss", "(targets != ignore_index).unsqueeze(1)", "(targets != -1).unsqueeze(1)", "cross-entropy: ignored count"),
    Mutant("loss:cross_entropy", "total / count", "total / len(flat)", "cross-entropy: divided by all"),
    Mutant("loss", "dlogits *= 1 - (logits / soft_cap).square()", "pass", "soft cap: derivative forgotten"),
    Mutant("loss", "part if dweight is None else dweight.add_(part)", "part", "head: earlier chunks forgotten"),
    Mutant("networks", "dz * gate * (1 - filtered * filtered)", "dz * (1 - filtered * filtered)", "gate forgotten"),
    Mutant("networks", "dz * filtered * gate * (1 - gate)", "dz * filtered * (1 - gate)", "σ' wrong"),
    Mutant("networks", "residual(grads, block, dstream, dbranch)", "dbranch", "gated block: stream forgotten"),
    Mutant("networks", "backward_mix(dy * (y > 0)) * (summed > 0)", "backward_mix(dy * (y > 0))", "gated wavenet: relu forgotten"),
    Mutant("networks", "residual(grads, f, dy, dbranch) if layer.residual else dbranch", "dbranch", "block: residual forgotten"),
    Mutant("networks", "dy = backward_norm(dy)", "pass", "post-norm forgotten"),
    Mutant("networks", "backward_ln_1(dx + dmemory)", "backward_ln_1(dx)", "encoder: keys and values forgotten"),
    Mutant("networks", "dmemory + more", "more", "encoder: one decoder block alone"),
    Mutant("networks", "backward_wte(dtarget + dsource)", "backward_wte(dtarget)", "seq2seq: source's embedding forgotten"),
    Mutant("encoder", "weights * dy.unsqueeze(1)", "dy.unsqueeze(1).expand(-1, tokens.shape[1], -1)", "class: sum for mean"),
    Mutant("encoder", "weights * dy.unsqueeze(1)", "dy.unsqueeze(1) / tokens.shape[1] * read.unsqueeze(-1)", "class: padding counted"),
    Mutant("encoder", "backward_wpe(de)", "pass", "class: positions forgotten"),
    Mutant("encoder", "backward_wte(de)", "pass", "class: tokens forgotten"),
    Mutant("recurrent", "dstate[0] + dy[:, t]", "dy[:, t]", "recurrent: nothing goes back in time"),
    Mutant("recurrent", "(dstate[0] + db_t @ layer.recur.weight, *dstate[1:])", "dstate", "recurrent: the way through U forgotten"),
    Mutant("recurrent", "[state[0] for state in states[:-1]]", "[state[0] for state in states[1:]]", "recurrent: dU of the states after"),
    Mutant("recurrent", "precise(rows).sum(0)", "precise(rows).mean(0)", "recurrent: db averaged"),
    Mutant("recurrent", "torch.stack(da[::-1], dim=1)", "torch.stack(da, dim=1)", "recurrent: time not turned round"),
    Mutant("recurrent", "dafter[0] * (1 - after[0] * after[0])", "dafter[0] * (1 - after[0])", "rnn: square forgotten"),
    Mutant("recurrent", "dh * (1 - z) * (1 - n * n)", "dh * z * (1 - n * n)", "gru: z for 1 - z"),
    Mutant("recurrent", "dh * (before[0] - n) * z * (1 - z)", "dh * before[0] * z * (1 - z)", "gru: n's part of dz"),
    Mutant("recurrent", "inside * b_n * r * (1 - r)", "inside * r * (1 - r)", "gru: factor b_n"),
    Mutant("recurrent", "inside * r", "inside", "gru: reset gate forgotten"),
    Mutant("recurrent", "(dh * z,)", "(torch.zeros_like(dh),)", "gru: the state kept forgotten"),
    Mutant("recurrent", "dafter[1] + dafter[0] * o * (1 - bounded * bounded)", "dafter[0] * o * (1 - bounded * bounded)", "lstm: c's way in time"),
    Mutant("recurrent", "dafter[1] + dafter[0] * o * (1 - bounded * bounded)", "dafter[1] + dafter[0] * o", "lstm: slope of tanh"),
    Mutant("recurrent", "dc * g * i * (1 - i)", "dc * i * (1 - i)", "lstm: di without g"),
    Mutant("recurrent", "dc * before[1] * f * (1 - f)", "dc * after[1] * f * (1 - f)", "lstm: df of c'"),
    Mutant("recurrent", "dc * i * (1 - g * g)", "dc * (1 - g * g)", "lstm: dg without i"),
    Mutant("recurrent", "dh * bounded * o * (1 - o)", "dh * o * (1 - o)", "lstm: do without tanh c"),
    Mutant("recurrent", "(torch.zeros_like(dh), dc * f)", "(torch.zeros_like(dh), dc)", "lstm: forget gate"),
    Mutant("networks", "dy / counts(dy, dy.shape[1])", "dy", "causal average: divided by nothing"),
    Mutant("networks", "shares.flip(1).cumsum(1).flip(1)", "shares.cumsum(1)", "causal average: sums from the beginning"),
    Mutant("networks", "residual(grads, net.average, dx, backward_average(dx))", "dx", "bag of words: the average forgotten"),
    Mutant("networks", "residual(grads, net.mlp, dy, backward_mlp(dy))", "dy", "bag of words: the hidden layer forgotten"),
    Mutant("shift", "F.pad(seen(dy, mask), (0, 0, -1, 1))", "earlier(dy, mask)", "token shift: the wrong way in time"),
    Mutant("shift", "seen(dy, mask)", "dy", "token shift: dx beyond a document's end"),
    Mutant("shift", "precise(earlier(x, mask) - x)", "precise(earlier(x, mask))", "token shift: x's own part of dw"),
    Mutant("shift", "precise(earlier(x, mask) - x)", "precise(earlier(x) - x)", "token shift: dw beyond a document's end"),
    Mutant("networks", "backwards.append(backward_shift)", "pass", "token shift: passed by"),
    Mutant("networks", "dkernel.mT.flatten(1)", "dkernel.flatten(1)", "dense wavenet: taps not moved back"),
]  # fmt: skip


UNTIED = ("--model.init_args.net.init_args.tie_weights", "false")  # else the head is the first to add to the table
RULES, STEP, REDUCED = "backprop.rules", "training.by_hand", "training.distributed.reduction"
DIVISION = "training.division"
WEIGHT = "self.division.weight(targets, self.parameters[0].dtype)"
ACCUMULATION = [
    Mutant(RULES, "known.scatter_add_", "known.scatter_", "a token seen twice counts once"),
    Mutant(RULES, "known += gradient", "self.keep(parameter, gradient)", "the last one wins"),
    Mutant(RULES, "known += gradient", "pass", "the first one wins"),
    Mutant(f"{RULES}:add_rows", "known is None", "True", "table anew"),
    Mutant(RULES, "torch.zeros_like(table)", "torch.ones_like(table)", "a table that begins at one"),
    Mutant(RULES, "parameter.grad = None", "pass", "the step before is not forgotten"),
    Mutant(STEP, "self.grads.begin(self.parameters)", "pass", "a step is not begun"),
    Mutant(DIVISION, "targets.numel() * self.micro_batches", "targets.numel()", "not divided by micro-batches"),
    Mutant(DIVISION, "targets.numel() * self.micro_batches", "targets.numel() * self.micro_batches**2", "divided by them twice"),
    Mutant(STEP, WEIGHT, f"{WEIGHT} * last", "a micro-batch lost"),
    Mutant(STEP, f"scale = {WEIGHT}", f"self.begin()\nscale = {WEIGHT}", "all but one lost"),
    Mutant(DIVISION, "positions * self.ranks / max(1, count)", "1.0", "ignored targets count"),
    Mutant(REDUCED, "torch.mul(gradient, 1 / self.world_size, out=part)", "part.copy_(gradient)", "a first gradient not divided"),
    Mutant(REDUCED, "part.add_(gradient, alpha=1 / self.world_size)", "part.add_(gradient)", "a later one not divided"),
    Mutant(REDUCED, "part.add_(gradient, alpha=1 / self.world_size)", "part.copy_(gradient / self.world_size)", "overwritten"),
    Mutant(REDUCED, "part.scatter_add_", "part.scatter_", "ranks: a token seen twice counts once"),
    Mutant(REDUCED, "rows.to(table.dtype) / self.world_size", "rows.to(table.dtype)", "rows not divided"),
    Mutant(REDUCED, "part.zero_()", "pass", "rows of the step before"),
    Mutant(REDUCED, "self.empty = set(self.parts)", "self.empty = set()", "ranks: the step before is not forgotten"),
    Mutant(REDUCED, "distributed.all_reduce(self.buckets[number], group=self.group, async_op=True)", "None", "not reduced"),
    Mutant(REDUCED, "not self.reducing", "False", "reduced after each micro-batch"),
    Mutant(REDUCED, "uses[id(p)]", "1", "a tied weight reduced before it is whole"),
    Mutant(DIVISION, "positions * self.ranks / max(1, count)", "positions / max(1, count)", "divided by ranks twice"),
]  # fmt: skip
COMPILED = [
    Mutant(STEP, "zip(self.parameters, found, strict=True)", "()", "the compiled graph's gradients are dropped"),
    Mutant(STEP, "zip(self.parameters, found, strict=True)", "zip(self.parameters[1:], found[1:], strict=True)", "one of them is"),
]  # fmt: skip


def of_network(name: str, *, training: bool) -> None:
    net = make(name).train(training)
    assert_same(net, *batch(net, 5, ignored=True))


def checks() -> list[Callable[[], object]]:
    """Return all that is checked of layers and networks."""
    return [
        *(partial(assert_layer, name) for name in LAYERS),
        *(partial(assert_loss_and_head, (2, 3), cap) for cap in (None, 3.0)),
        *(partial(of_network, name, training=training) for name in NETWORKS for training in (True, False)),
        partial(assert_attention, 300),
        assert_gradients_add_up,
    ]


def verdict(order: list[Callable[[], object]]) -> str:
    """Return what the checks say; that which rejects is the next one's first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.models.parts.PART", 50)  # so that layers work in several parts
        for check in list(order):
            try:
                check()
            except (AssertionError, RuntimeError, ValueError, IndexError) as error:
                order.remove(check)
                order.insert(0, check)
                return f"rejected: {str(error).splitlines()[0][:60] if str(error) else type(error).__name__}"
    return "accepted"


def test_the_checks_accept_the_rules_and_reject_every_mutant() -> None:
    order = checks()
    assert verdict(order) == "accepted"
    verdicts = {}
    for mutant in MUTANTS:
        with broken(mutant):
            verdicts[f"{mutant.place}: {mutant.name}"] = verdict(order)
    assert len(verdicts) == len(MUTANTS)
    width = max(map(len, verdicts))
    print(*(f"{name:<{width}}  {text}" for name, text in verdicts.items()), sep="\n")
    assert [name for name, text in verdicts.items() if text == "accepted"] == []
    seed(0)
    assert verdict(order) == "accepted"  # all is as before


def sequence(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Sequential:
    """Put a layer between a table and a head, so that it is a network."""
    layer = build()
    with torch.no_grad():
        channels = layer(torch.zeros(shape)).shape[-1]
    return nn.Sequential(nn.Embedding(V, shape[-1]), layer, nn.Linear(channels, V))


def cases() -> list[Callable[[], nn.Module]]:
    """Return what makes each network, and each layer as one; those first that find the most."""
    first = ("gpt today", "mlp by hand", "gated wavenet", "wavenet dense", "seq2seq", "gpt separate", "gpt post norm")
    nets = [partial(make, name, torch.float32) for name in sorted(NETWORKS, key=lambda name: name not in first)]
    return [*nets[: len(first)], *(partial(sequence, *layer) for layer in LAYERS.values()), *nets[len(first) :]]


def wrong(case: Callable[[], nn.Module], dtype: torch.dtype) -> str | None:
    """Return the first thing that `lm gradients` finds wrong of a network."""
    seed(1)
    net = case()
    if isinstance(net, nn.Sequential):
        tokens = torch.randint(V, (4, 8, 6 if isinstance(net[1], nn.Conv1d) else T - 3))
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
            for row in table:
                if not row.approximate:
                    return f"{way}: {row.name}"
    return None


def found(order: list[Callable[[], nn.Module]], dtype: torch.dtype) -> str | None:
    """Return the first thing that is found wrong; the network that finds it is the next one's first."""
    for case in order:
        try:
            what = wrong(case, dtype)
        except Exception as error:  # a wrong rule may raise anything; `lm gradients` says that, too
            what = type(error).__name__
        if what is not None:
            order.remove(case)
            order.insert(0, case)
            return what
    return None


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=pytest.mark.slow), pytest.param(torch.float32, marks=pytest.mark.long)],
    ids=str,
)
def test_the_checker_finds_every_mutant_in_each_arithmetic(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs long sequences, many logits or ignored targets has them."""
    monkeypatch.setattr("lm.backprop.attention.BLOCK", 3)
    monkeypatch.setattr("lm.backprop.loss.CHUNK", 4 * V)
    monkeypatch.setattr("lm.models.parts.PART", 50)
    order = cases()
    assert found(order, dtype) is None
    verdicts = {}
    for mutant in [*MUTANTS, *ACCUMULATION]:
        with broken(mutant):
            monkeypatch.setattr("lm.backprop.attention.BLOCK", 3)
            monkeypatch.setattr("lm.backprop.loss.CHUNK", 4 * V)
            monkeypatch.setattr("lm.models.parts.PART", 50)
            verdicts[f"{mutant.place}: {mutant.name}"] = found(order, dtype)
    assert len(verdicts) == len(MUTANTS) + len(ACCUMULATION)
    print(*verdicts.items(), sep="\n")
    assert [name for name, what in verdicts.items() if what is None] == []


@pytest.mark.parametrize(
    "mutant", often(zip(ACCUMULATION), lambda case: case[0] in ACCUMULATION[::4]), ids=lambda mutant: mutant.name
)
def test_lm_gradients_finds_every_wrong_sum(lm, workplace: Path, mutant: Mutant) -> None:
    untied = UNTIED * ("table" in mutant.old or "zero_" in mutant.old)
    with broken(mutant):
        code, _, err = lm("gradients", "--config", "tiny.yaml", "--json", *untied)
    assert code == 1
    assert "disagree with autograd (" in err or "could not be found" in err


def test_lm_gradients_finds_them_in_bfloat16_too(lm, workplace: Path) -> None:
    recipe("MLP")
    for words in ((), ("--model.init_args.net.init_args.bessel", "true")):
        assert lm("gradients", "--config", "net.yaml", "--dtype", "bfloat16", *words)[0] == 0
    for mutant in [one for one in MUTANTS if "bessel" in one.old] + ACCUMULATION[:1]:
        with broken(mutant):
            code, _, err = lm("gradients", "--config", "net.yaml", "--dtype", "bfloat16", *words)
        assert code == 1 and "in float64" in err, mutant


@pytest.mark.slow
@pytest.mark.parametrize("mutant", COMPILED, ids=lambda mutant: mutant.name)
def test_lm_gradients_finds_what_is_wrong_of_a_compiled_graph(lm, workplace: Path, mutant: Mutant) -> None:
    with broken(mutant):
        code, _, err = lm("gradients", "--config", "tiny.yaml", "--model.init_args.compile", "true")
    assert code == 1 and ("disagree with autograd (" in err or "could not be found" in err)


@pytest.mark.parametrize(
    "mutant",
    often([(one,) for one in ACCUMULATION if one.place.partition(":")[0] in (RULES, STEP)], 3),
    ids=lambda mutant: mutant.name,
)
def test_an_audit_finds_a_wrong_sum(lm, workplace: Path, mutant: Mutant) -> None:
    words = ["--model", "lm.training.ManualLanguageModel", "--model.init_args.audit_every", 2]
    words += ["--trainer.accumulate_grad_batches", 2, "--trainer.max_steps", 3]
    with broken(mutant):
        code, _, err = lm("fit", "--config", "tiny.yaml", *words, *UNTIED * ("table" in mutant.old))
    assert code == 1
    assert "step 2: the gradient by hand and autograd's disagree at " in err


SUM = "total / count"
LOSS_ALONE = [  # right gradients of a loss that is wrong
    ("Bigram", (), Mutant("loss:cross_entropy", SUM, "total / len(flat)", "divided by all")),
    ("Bigram", ("--dtype", "bfloat16"), Mutant("loss:cross_entropy", SUM, "total / len(flat)", "by all, bfloat16")),
    ("MLP", (), Mutant("loss:head_and_loss", SUM, "total / len(flat)", "head: divided by all")),
    ("MLP", ("--against", "differences"), Mutant("loss:head_and_loss", SUM, "1.01 * total / count", "a little more")),
    ("MLP", (), Mutant(STEP, "loss * scale * self.division.micro_batches", "loss * scale", "a micro-batch's alone")),
    ("MLP", (), Mutant(DIVISION, "total / max(1, count)", "total / positions", "loss: ignored targets count")),
]


@pytest.mark.parametrize(("network", "options", "mutant"), LOSS_ALONE, ids=[mutant.name for *_, mutant in LOSS_ALONE])
def test_a_wrong_loss_is_a_row(lm, workplace: Path, network: str, options: tuple[str, ...], mutant: Mutant) -> None:
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
    with broken(mutant):
        code, out, err = lm(*words)
    assert code == 1 and "1 of " in err and err.strip().endswith(": loss"), err
    assert [row["name"] for row in json.loads(out.splitlines()[-1])["rows"] if not row["approximate"]] == ["loss"]


ALL = [*MUTANTS, *ACCUMULATION, *COMPILED, *(mutant for *_, mutant in LOSS_ALONE)]


def test_mutants_find_their_place_however_the_source_is_formatted() -> None:
    """What is not there, or more than once, is an error."""
    names = [(one.place.partition(":")[0], one.name) for one in ALL]
    assert len(names) == len(set(names))
    files = {mutant: Path(str(mutant.module().__file__)) for mutant in ALL}
    sources = {file: file.read_text() for file in files.values()}
    formatted = {file: ast.unparse(ast.parse(source)) for file, source in sources.items()}
    for mutant, file in files.items():
        assert formatted[file] != sources[file]  # without comments, a statement in a line
        assert ast.dump(mutant.changed(formatted[file])) == ast.dump(mutant.changed(sources[file])), mutant
    with pytest.raises(LookupError, match="linear has 0 times: dy - layer"):
        Mutant("linear", "dy - layer", "dy", "").changed("return dy @ layer  # dy - layer")
    with pytest.raises(LookupError, match="linear has 2 times: dy @ x"):
        Mutant("linear", "dy @ x", "dy", "").changed("a, b = dy @ x, dy @ x")
    with pytest.raises(LookupError, match="linear:f is there 0 times"):
        Mutant("linear:f", "dy @ x", "dy", "").changed("a = dy @ x")
