"""Small networks and layers, and the checks of their gradients by hand against autograd's in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lm.backprop import Gradients, loss_and_gradients, run
from lm.backprop.attention import attend
from lm.backprop.loss import cross_entropy, head_and_loss
from lm.models import (
    GPT,
    GRU,
    LSTM,
    MLP,
    RNN,
    BagOfWords,
    Bigram,
    Encoder,
    GatedWaveNet,
    Seq2Seq,
    WaveNet,
    feed_forward,
)
from lm.models.dropout import Dropout
from lm.models.feed_forward import GELU, ReLUSquared
from lm.models.layers import BatchNorm
from lm.models.norms import RMSNorm
from lm.models.shift import TokenShift

V, T = 11, 8
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8}
TODAY = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "qk_norm": True, "n_kv_head": 1}
NETWORKS = {
    "bigram": lambda: Bigram(V, T),
    "mlp": lambda: MLP(V, T, n_embd=3, n_hidden=7, n_layer=2),
    "mlp by hand": lambda: MLP(V, T, n_embd=3, n_hidden=7, bias=True, bessel=True),
    "mlp without norm": lambda: MLP(V, T, n_embd=3, n_hidden=7, batch_norm=False, bias=True),
    "wavenet": lambda: WaveNet(V, T, n_embd=3, n_hidden=5),
    "wavenet bessel": lambda: WaveNet(V, T, n_embd=3, n_hidden=5, bessel=True),
    "wavenet per position": lambda: WaveNet(V, T, n_embd=3, n_hidden=5, norm_over_time=False, bessel=True),
    "wavenet dense": lambda: WaveNet(V, T, n_embd=3, n_hidden=5, depth=2, dense=True),
    "gated wavenet": lambda: GatedWaveNet(V, T, n_embd=4, n_layer=3, dropout=0.2),
    "gpt": lambda: GPT(V, T, **SMALL),
    "gpt dropout": lambda: GPT(V, T, **SMALL, dropout=0.3),
    "gpt untied no bias": lambda: GPT(V, T, **SMALL, bias=False, tie_weights=False, head_bias=True),
    "gpt today": lambda: GPT(V, T, **SMALL, **TODAY, bias=False),
    "gpt shared keys": lambda: GPT(V, T, **{**SMALL, "n_head": 4}, n_kv_head=2, logit_soft_cap=2.0),
    "gpt separate": lambda: GPT(V, T, **SMALL, attention="separate", feed_forward="single", dropout=0.2),
    "gpt one head": lambda: GPT(V, T, n_layer=1, n_head=1, n_embd=8, norm="none", feed_forward="none", residual=False),
    "gpt post norm": lambda: GPT(V, T, **SMALL, norm_position="post", feed_forward="relu", projection=False),
    "gpt squared relu": lambda: GPT(V, T, **SMALL, feed_forward="relu_squared", positions="none", attention_bias=False),
    "gpt erf": lambda: GPT(V, T, **SMALL, feed_forward="gelu_erf", norm_eps=0.1),
    "gpt rms eps": lambda: GPT(V, T, **SMALL, norm="rms", norm_eps=0.1),
    "gpt swiglu bias": lambda: GPT(V, T, **SMALL, feed_forward="swiglu", dropout=0.1, key_dropout=True),
    "gpt documents": lambda: GPT(V, T, **SMALL, **TODAY, document_end=2, dropout=0.1),
    "gpt token shift": lambda: GPT(V, T, **SMALL, token_shift=True, dropout=0.1),
    "gpt token shift of documents": lambda: GPT(V, T, **SMALL, token_shift=True, document_end=0),
    "gpt token shift alone": lambda: GPT(V, T, **SMALL, token_shift=True, feed_forward="none"),
    "gpt token shift post norm": lambda: GPT(V, T, **SMALL, token_shift=True, norm_position="post"),
    "gpt documents post norm": lambda: GPT(V, T, **SMALL, document_end=2, norm_position="post"),
    "rnn": lambda: RNN(V, T, n_embd=3, n_hidden=5, n_layer=2, dropout=0.2),
    "gru": lambda: GRU(V, T, n_embd=3, n_hidden=5, n_layer=2),
    "lstm": lambda: LSTM(V, T, n_embd=3, n_hidden=5, n_layer=2),
    "bag of words": lambda: BagOfWords(V, T, n_embd=4, n_hidden=5),
    "encoder": lambda: Encoder(V, T, **SMALL, dropout=0.2, pad_token=2),
    "seq2seq": lambda: Seq2Seq(V, T, **SMALL, start_token=1, pad_token=2, dropout=0.2),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 5, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "rms norm": (lambda: RMSNorm(6), (3, 5, 6)),
    "torch's rms norm": (lambda: nn.RMSNorm(6), (3, 5, 6)),
    "batch norm": (lambda: BatchNorm(6), (7, 6)),
    "batch norm over time": (lambda: BatchNorm(6, bessel=True), (3, 5, 6)),
    "batch norm per position": (lambda: BatchNorm(6, n_positions=5), (3, 5, 6)),
    "tanh": (nn.Tanh, (3, 6)),
    "sigmoid": (nn.Sigmoid, (3, 6)),
    "relu": (nn.ReLU, (3, 6)),
    "squared relu": (ReLUSquared, (3, 6)),
    "gelu": (GELU, (3, 60)),
    "gelu tanh": (lambda: GELU(approximate="tanh"), (3, 60)),
    "torch's gelu": (lambda: nn.GELU(approximate="tanh"), (3, 60)),
    "feed-forward of another activation": (
        lambda: feed_forward.BlockMLP(n_embd=6, hidden_size=9, activation=nn.Tanh(), dropout=0.2, bias=True),
        (3, 5, 6),
    ),
    "dropout": (lambda: Dropout(0.3), (3, 60)),
    "dropout of rows": (lambda: Dropout(0.3, rows=True), (3, 20, 4)),
    "torch's dropout": (lambda: nn.Dropout(0.3), (3, 60)),
    "identity": (nn.Identity, (3, 6)),
    "token shift": (lambda: TokenShift(6), (3, 5, 6)),
    "convolution": (lambda: nn.Conv1d(6, 4, 3, dilation=2), (3, 6, 9)),
}
FIXED = (MLP, WaveNet, Encoder)


def seed(number: int) -> None:
    """Seed the CPU generator alone: torch.manual_seed also keeps a stack trace, which costs more than a small net."""
    torch.default_generator.manual_seed(number)


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network, in training mode, none of whose parameters is zero or one so that no error hides."""
    seed(3)
    net = NETWORKS[name]().to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return net


def batch(net: nn.Module, count: int, time: int = T, ignored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(V, (count, time))
    last = isinstance(net, FIXED) and not getattr(net, "dense", False)
    targets = torch.randint(V, (count,) if last else (count, time))
    if ignored:
        targets[torch.rand(targets.shape) < 0.4] = -100
        targets.view(-1)[0] = 1
    return tokens, targets


def both(
    net: nn.Module, tokens: torch.Tensor, targets: torch.Tensor, recomputed: tuple[nn.Module, ...] = ()
) -> tuple[dict, dict, float, float]:
    """Return the gradients and the loss by autograd and by hand, from the same random numbers.

    Args:
        net: A network.
        tokens: (B, T).
        targets: As its logits.
        recomputed: Layers that are computed again in the backward pass by hand.
    """
    grads = Gradients()
    grads.recomputed = recomputed
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    seed(5)
    logits = net(tokens)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    loss.backward()
    after = {name: buffer.clone() for name, buffer in net.named_buffers()}
    state = torch.get_rng_state()
    wanted = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in net.named_parameters()}
    for name, buffer in net.named_buffers():
        buffer.copy_(buffers[name])
    net.zero_grad()
    seed(5)
    with torch.no_grad():
        by_hand = loss_and_gradients(net, grads, tokens, targets)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, after[name], rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), state)  # the same random numbers were drawn
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in net.named_parameters()}
    return wanted, found, loss.item(), by_hand.item()


def assert_same(
    net: nn.Module,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    tolerance: float = 1e-10,
    recomputed: tuple[nn.Module, ...] = (),
) -> None:
    wanted, found, loss, by_hand = both(net, tokens, targets, recomputed)
    assert by_hand == pytest.approx(loss, rel=1e-12)
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 1e-4
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 0.01 * largest)
        assert float((gradient - found[name]).abs().max()) <= tolerance * scale, name


def assert_layer(name: str) -> None:
    """Check a layer's output, and its gradients by its input and its parameters."""
    seed(2)
    build, shape = LAYERS[name]
    layer = build().double()
    for parameter in layer.parameters():
        parameter.data += torch.randn_like(parameter)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    seed(4)
    y = layer(x)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    seed(4)
    with torch.no_grad():
        again, backward = run(layer, Gradients(), x)
        dx = backward(dy)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-13)
    for a, b in zip(wanted, [dx, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def assert_attention(time: int) -> None:
    """Check causal attention to so many tokens: its backward pass works block by block."""
    q, k, v = (torch.randn(5, 3, time, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (q, k, v), dy)
    with torch.no_grad():
        again, backward = attend(q, k, v)
        found = backward(dy)
    torch.testing.assert_close(again, y)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def assert_loss_and_head(shape: tuple[int, ...], cap: float | None) -> None:
    """Check the cross-entropy alone, and with the output head in chunks of two predictions."""
    head = nn.Linear(5, V).double()
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, shape)
    targets.view(-1)[1] = -100
    logits = head(x) if cap is None else cap * torch.tanh(head(x) / cap)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    dlogits, *wanted = torch.autograd.grad(3 * loss, [logits, x, head.weight, head.bias])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm.backprop.loss.CHUNK", 2 * V)
        grads = Gradients()
        grads.keep_dlogits = True
        found, dx = head_and_loss(head, grads, x, targets, soft_cap=cap, scale=3)
        alone, drows = cross_entropy(logits, targets, scale=3)
    assert float(found) == pytest.approx(loss.item(), rel=1e-12) == pytest.approx(alone.item(), rel=1e-12)
    for a, b in zip([dlogits, *wanted], [drows, dx, head.weight.grad, head.bias.grad], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(grads.dlogits, dlogits.flatten(0, -2), rtol=1e-10, atol=1e-13)


def assert_gradients_add_up() -> None:
    """Check that a second pass adds to the first one's gradients, and that frozen parameters have none."""
    net = make("gpt")
    net.wpe.weight.requires_grad_(False)
    tokens, targets = batch(net, 4)
    with torch.no_grad():
        loss_and_gradients(net, Gradients(), tokens, targets)
        once = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        loss_and_gradients(net, Gradients(), tokens, targets, scale=2)
    assert "wpe.weight" not in once and net.wpe.weight.grad is None
    for name, gradient in once.items():
        torch.testing.assert_close(net.get_parameter(name).grad, 3 * gradient, rtol=1e-12, atol=1e-14)
