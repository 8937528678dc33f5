"""Rules of whole networks, from the tokens to what the output head reads.

Shapes: B batch, T time, C channels (n_embd), V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.backprop.linear import chained, convolution, positions
from lm.backprop.loss import cross_entropy, head_and_loss
from lm.backprop.rules import Backward, Gradients, kind_of, once, rule, run
from lm.models import GPT, MLP, Bigram, GatedWaveNet, Seq2Seq, WaveNet
from lm.models.bag_of_words import BagOfWords, CausalAverage, counts
from lm.models.gpt import Block
from lm.models.layers import check_length, padded
from lm.models.seq2seq import DecoderBlock, EncoderBlock
from lm.models.wavenet import GatedBlock

_bodies: dict[type, Callable[..., tuple[Tensor, Backward]]] = {}


def loss_and_gradients(
    net: nn.Module,
    grads: Gradients,
    tokens: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Go through a network and the cross-entropy, there and back, without autograd.

    Args:
        net: A network whose layers have rules.
        grads: Takes the gradients of scale times the loss.
        tokens: int64 (B, T).
        targets: int64, (B, T) or (B,), as the network's logits.
        ignore_index: The target that does not count.
        scale: Factor on the gradients.

    Returns:
        The mean cross-entropy.

    Raises:
        NoRuleError: A layer has no rule.
        ValueError: Logits and targets do not fit.
    """
    if kind_of(net) not in _bodies:
        logits, backward = run(net, grads, tokens)
        _check(logits.shape[:-1], targets)
        loss, dlogits = cross_entropy(logits, targets, ignore_index=ignore_index, scale=scale)
        if grads.keep_dlogits:
            grads.dlogits = dlogits.flatten(0, -2)
        backward(dlogits)
        return loss
    x, backward = _bodies[kind_of(net)](net, grads, tokens)
    _check(x.shape[:-1], targets)
    head: Any = net.lm_head
    loss, dx = head_and_loss(
        head,
        grads,
        x,
        targets,
        soft_cap=getattr(net, "logit_soft_cap", None),
        ignore_index=ignore_index,
        scale=scale,
    )
    del x
    backward(dx)
    return loss


def _check(shape: torch.Size, targets: Tensor) -> None:
    if shape != targets.shape:
        raise ValueError(f"the network has predictions {tuple(shape)}, the data has targets {tuple(targets.shape)}")


def body(kind: type[nn.Module]) -> Callable[[Any], Any]:
    """Register the rule of a network up to its head, `lm_head`; the rule of the whole follows from it."""

    def register(function: Callable[..., tuple[Tensor, Backward]]) -> Callable[..., tuple[Tensor, Backward]]:
        _bodies[kind] = function

        @rule(kind)
        def whole(net: Any, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
            x, backward = function(net, grads, tokens)
            logits, backward_head = run(net.lm_head, grads, x)
            cap = getattr(net, "logit_soft_cap", None)
            if cap is None:
                return logits, lambda dy: backward(backward_head(dy))
            bounded = torch.tanh(logits / cap)
            return cap * bounded, lambda dy: backward(backward_head(dy * (1 - bounded * bounded)))

        return function

    return register


@rule(Bigram)
def bigram(net: Bigram, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """The table is all there is."""
    return run(net.table, grads, tokens)


@body(MLP)
def mlp(net: MLP, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """Embeddings side by side, then the hidden layers; concatenation only moves numbers."""
    check_length(tokens, net.block_size)
    e, backward_wte = run(net.wte, grads, padded(tokens, net.block_size))  # (B, T) -> (B, T, C)
    x, backward_hidden = run(net.hidden, grads, e.flatten(1))  # (B, T C) -> (B, n_hidden)
    return x, chained([lambda dy: backward_wte(dy.view(e.shape)), backward_hidden])


@body(WaveNet)
def wavenet(net: WaveNet, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """Fused layer by layer; or, dense, the same layers as dilated convolutions."""
    check_length(tokens, net.block_size)
    if net.dense:
        return _dense_wavenet(net, grads, tokens)
    x, backward_wte = run(net.wte, grads, padded(tokens, net.context))  # (B, T) -> (B, T, C)
    backwards = [backward_wte]
    for block in net.h:
        x, backward = run(block, grads, x)  # (B, T, C) -> (B, T/n, C)
        backwards.append(backward)
    return x, chained(backwards)


def _dense_wavenet(net: WaveNet, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    x, backward = run(net.wte, grads, F.pad(tokens, (net.context - 1, 0)))  # (B, T) -> (B, T + context - 1, C)
    backwards = [backward]
    layers: Any
    for level, layers in enumerate(net.h):
        x, backward = _dense_level(layers, grads, x, layers[0].n ** level)
        backwards.append(backward)
    return x, chained(backwards)


def _dense_level(layers: Any, grads: Gradients, x: Tensor, dilation: int) -> tuple[Tensor, Backward]:
    """A linear map of n neighbours as a convolution: the kernel is the weight with its taps moved to the end."""
    flatten, linear, norm, tanh = layers
    kernel = linear.weight.unflatten(1, (flatten.n, -1)).mT  # (C', n C) -> (C', n, C) -> (C', C, n)
    y, backward_conv = convolution(x.mT, kernel, dilation)  # (B, T, C) -> (B, C, T) -> (B, C', T')
    y, backward_norm = run(norm, grads, y.mT)  # -> (B, T', C')
    y, backward_tanh = run(tanh, grads, y)

    def backward(dy: Tensor) -> Tensor:
        dx, dkernel = backward_conv(backward_norm(backward_tanh(dy)).mT)
        grads.add(linear.weight, dkernel.mT.flatten(1))  # (C', C, n) -> (C', n, C) -> (C', n C)
        return dx.mT

    return y, backward


@rule(GatedBlock)
def gated_block(block: GatedBlock, grads: Gradients, x: Tensor) -> tuple[tuple[Tensor, Tensor], Backward]:
    """z = tanh(f) σ(g); one half of a projection of z adds to the stream, the other goes to the output.

    Product rule: df = dz σ(g) (1 - tanh² f), dg = dz tanh(f) σ(g) (1 - σ(g)). The zeros put before the sequence are
    constants; what flows to them is dropped. The stream passes by untouched: its gradient is added.
    """
    T = x.shape[2]  # noqa: N806
    both, backward_conv = run(block.conv, grads, F.pad(x, (block.dilation, 0)))  # (B, C, T + d) -> (B, 2 C, T)
    filtered, gate = both.chunk(2, dim=1)  # each (B, C, T)
    filtered, gate = filtered.tanh(), gate.sigmoid()
    z, backward_drop = run(block.drop, grads, filtered * gate)
    parts, backward_proj = run(block.proj, grads, z)  # (B, C, T) -> (B, 2 C, T)
    branch, skip = parts.chunk(2, dim=1)

    def backward(dstream: Tensor, dskip: Tensor) -> Tensor:
        dz = backward_drop(backward_proj(torch.cat([dstream, dskip], dim=1)))
        df = dz * gate * (1 - filtered * filtered)
        dg = dz * filtered * gate * (1 - gate)
        dbranch = backward_conv(torch.cat([df, dg], dim=1))[:, :, -T:]  # (B, 2 C, T) -> (B, C, T + d) -> (B, C, T)
        return residual(grads, block, dstream, dbranch)

    return (x + branch, skip), backward


@body(GatedWaveNet)
def gated_wavenet(net: GatedWaveNet, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """The skips of all blocks are summed, so each gets the same gradient; the last stream itself goes nowhere."""
    check_length(tokens, net.block_size)
    x, backward_wte = run(net.wte, grads, tokens)  # (B, T) -> (B, T, C)
    x, backwards, skips = x.mT, [], torch.zeros_like(x.mT)  # (B, C, T)
    for block in net.h:
        (x, skip), backward_block = run(block, grads, x)
        backwards.append(backward_block)
        skips = skips + skip
    summed = F.relu(skips.mT)  # (B, T, C)
    mixed, backward_mix = run(net.mix, grads, summed)
    y = F.relu(mixed)

    @once
    def backward(dy: Tensor) -> None:
        dskip = (backward_mix(dy * (y > 0)) * (summed > 0)).mT  # (B, C, T)
        dstream = torch.zeros_like(dskip)
        while backwards:
            dstream = backwards.pop()(dstream, dskip)
        backward_wte(dstream.mT)

    return y, backward


@rule(CausalAverage)
def causal_average(layer: CausalAverage, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """y_t = Σ_{s ≤ t} x_s / (t + 1): x_s is in every average from s on, so dx_s = Σ_{t ≥ s} dy_t / (t + 1)."""

    def backward(dy: Tensor) -> Tensor:
        shares = dy / counts(dy, dy.shape[1])  # (B, T, C) / (T, 1)
        return shares.flip(1).cumsum(1).flip(1)  # sums from the end

    return layer(x), backward


@body(BagOfWords)
def bag_of_words(net: BagOfWords, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """Two residual sums; token and position embeddings add up."""
    check_length(tokens, net.block_size)
    wpe, backward_wpe = positions(net.wpe, grads, tokens.shape[1])
    e, backward_wte = run(net.wte, grads, tokens)  # (B, T) -> (B, T, C)
    e = e + wpe  # (B, T, C) + (T, C)
    mean, backward_average = run(net.average, grads, e)
    x = e + mean
    y, backward_mlp = run(net.mlp, grads, x)

    @once
    def backward(dy: Tensor) -> None:
        dx = residual(grads, net.mlp, dy, backward_mlp(dy))
        de = residual(grads, net.average, dx, backward_average(dx))
        backward_wpe(de)
        backward_wte(de)

    return x + y, backward


def residual(grads: Gradients, branch: nn.Module, dy: Tensor, dbranch: Tensor) -> Tensor:
    """Return the gradient by x of x + f(x), which reads x twice: dy + what came back through the branch f.

    Where `grads` asks for it, the branch's part of the two is noted.
    """
    if grads.shares is not None:
        through = dbranch.float().norm()
        grads.shares[branch] = through / (through + dy.float().norm())
    return dy + dbranch


@rule(Block)
def block(layer: Block, grads: Gradients, x: Tensor, *mask: Tensor) -> tuple[Tensor, Backward]:
    """Attention, under its mask where there is one, then the feed-forward network, each a `_branch`."""
    backwards = []
    for parts in layer.parts(*mask):
        x, backward = _branch(layer, grads, x, *parts, mask)
        backwards.append(backward)
    return x, chained(backwards)


def _branch(
    layer: Block,
    grads: Gradients,
    x: Tensor,
    norm: nn.Module,
    shift: nn.Module | None,
    f: nn.Module,
    more: tuple[Tensor, ...],
    mask: tuple[Tensor, ...],
) -> tuple[Tensor, Backward]:
    """y = x + f(shift(norm(x))), the shift where there is one. Post-norm: norm(x + f(shift(x))).

    x is read twice, so dx = dy + what comes back by f, shift and norm.
    """
    y, backwards = x, []
    if not layer.post:
        y, backward_norm = run(norm, grads, y)
        backwards.append(backward_norm)
    if shift is not None:
        y, backward_shift = run(shift, grads, y, *mask)
        backwards.append(backward_shift)
    y, backward_f = run(f, grads, y, *more)
    through = chained([*backwards, backward_f])
    if layer.residual:
        y = x + y
    if layer.post:
        y, backward_norm = run(norm, grads, y)

    def backward(dy: Tensor) -> Tensor:
        if layer.post:
            dy = backward_norm(dy)
        dbranch = through(dy)
        return residual(grads, f, dy, dbranch) if layer.residual else dbranch

    return y, backward


@body(GPT)
def gpt(net: GPT, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """Token and position embeddings add up, so both get the sum's gradient."""
    T = tokens.shape[1]  # noqa: N806
    check_length(tokens, net.block_size)
    x, backward_wte = run(net.wte, grads, tokens)  # (B, T) -> (B, T, C)
    backward_wpe: Backward | None = None
    if net.wpe is not None:
        wpe, backward_wpe = positions(net.wpe, grads, T)
        x = x + wpe  # (B, T, C) + (T, C)

    def backward_embeddings(dy: Tensor) -> None:
        if backward_wpe is not None:
            backward_wpe(dy)
        backward_wte(dy)

    backwards = [backward_embeddings]
    mask = net.mask(tokens)
    for layer in (net.drop, *net.h, net.ln_f):
        x, backward = run(layer, grads, x, *(mask if isinstance(layer, Block) else ()))
        backwards.append(backward)
    return x, chained(backwards)


@rule(EncoderBlock)
def encoder_block(layer: EncoderBlock, grads: Gradients, x: Tensor, source_mask: Tensor) -> tuple[Tensor, Backward]:
    """As GPT's block; what attention reads as x and as memory is the same, so its two gradients add up."""
    y, backward_ln_1 = run(layer.ln_1, grads, x)
    y, backward_attn = run(layer.attn, grads, y, y, source_mask)
    x = x + y
    y, backward_ln_2 = run(layer.ln_2, grads, x)
    y, backward_mlp = run(layer.mlp, grads, y)

    def backward(dy: Tensor) -> Tensor:
        dy = residual(grads, layer.mlp, dy, backward_ln_2(backward_mlp(dy)))
        dx, dmemory = backward_attn(dy)
        return residual(grads, layer.attn, dy, backward_ln_1(dx + dmemory))

    return x + y, backward


@rule(DecoderBlock)
def decoder_block(
    layer: DecoderBlock, grads: Gradients, x: Tensor, memory: Tensor, target_mask: Tensor, source_mask: Tensor
) -> tuple[Tensor, Backward]:
    """Three residual sums; the second also has a gradient for the memory."""
    y, backward_ln_1 = run(layer.ln_1, grads, x)
    y, backward_attn = run(layer.attn, grads, y, y, target_mask)
    x = x + y
    y, backward_ln_2 = run(layer.ln_2, grads, x)
    y, backward_cross = run(layer.cross_attn, grads, y, memory, source_mask)
    x = x + y
    y, backward_ln_3 = run(layer.ln_3, grads, x)
    y, backward_mlp = run(layer.mlp, grads, y)

    def backward(dy: Tensor) -> tuple[Tensor, Tensor]:
        dy = residual(grads, layer.mlp, dy, backward_ln_3(backward_mlp(dy)))
        dx, dmemory = backward_cross(dy)
        dy = residual(grads, layer.cross_attn, dy, backward_ln_2(dx))
        dx, dself = backward_attn(dy)
        return residual(grads, layer.attn, dy, backward_ln_1(dx + dself)), dmemory

    return x + y, backward


@body(Seq2Seq)
def seq2seq(net: Seq2Seq, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """Every decoder block reads the encoder's output, so the encoder gets the sum of their gradients."""
    T = tokens.shape[1]  # noqa: N806
    check_length(tokens, net.block_size)
    at, source_mask, target_mask = net.masks(tokens)
    embedded, backward_wte = run(net.wte, grads, tokens)  # (B, T) -> (B, T, C)
    wpe, backward_wpe_encoder = positions(net.wpe_encoder, grads, T)
    memory, backward = run(net.drop, grads, embedded + wpe)
    encoders = [backward]
    for layer in net.encoder:
        memory, backward = run(layer, grads, memory, source_mask)
        encoders.append(backward)
    memory, backward = run(net.ln_encoder, grads, memory)
    encoders.append(backward)
    wpe, backward_wpe_decoder = run(net.wpe_decoder, grads, at)  # (B, T) -> (B, T, C)
    x, backward_drop = run(net.drop, grads, embedded + wpe)
    decoders = []
    for layer in net.decoder:
        x, backward = run(layer, grads, x, memory, target_mask, source_mask)
        decoders.append(backward)
    x, backward_ln_f = run(net.ln_f, grads, x)

    @once
    def backward_all(dy: Tensor) -> None:
        dy = backward_ln_f(dy)
        dmemory = torch.zeros_like(dy)
        while decoders:
            dy, more = decoders.pop()(dy)
            dmemory = dmemory + more
        dtarget = backward_drop(dy)
        backward_wpe_decoder(dtarget)
        dsource = chained(encoders)(dmemory)
        backward_wpe_encoder(dsource)
        backward_wte(dtarget + dsource)

    return x, backward_all
