"""Rules of recurrent layers, backpropagation through time, and of networks of them.

Shapes: B batch, T time, C channels read, H channels of a state, G gates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lm.backprop.linear import chained, linear_backward
from lm.backprop.networks import body
from lm.backprop.rules import Backward, Gradients, rule, run
from lm.models.layers import check_length
from lm.models.parts import precise, rows_of
from lm.models.recurrent import GRU, LSTM, RNN, GRULayer, LSTMLayer, Recurrent, RNNLayer, State

Slopes = tuple[Tensor, Tensor, State]
Cell = Callable[[Tensor, Tensor, State, State, State], Slopes]


def through_time(layer: Recurrent, grads: Gradients, x: Tensor, cell_backward: Cell) -> tuple[Tensor, Backward]:
    """Each state is read twice: as the layer's output, and by the next cell. So its gradient is the sum of the two.

    The states' gradients go from the last token to the first, through b = U h + c: dh = Uᵀ db. The weights are used at
    every token, so theirs are sums over all: dU = Σ_t db_t h_(t-1)ᵀ, and those of W as in a linear layer.

    Args:
        layer: The layer.
        grads: Takes the gradients of its parameters.
        x: (B, T, C).
        cell_backward: From a, b, the states before and after, and the gradients by the states after, to those by a, by
            b, and by the states before, but for what comes through b.
    """
    a = layer.inputs(x)  # (B, T, G H)
    states, made = [layer.start(a)], []
    for a_t in a.unbind(1):
        made.append(layer.recur(states[-1][0]))  # b (B, G H)
        states.append(layer.cell(a_t, made[-1], states[-1]))
    y = torch.stack([state[0] for state in states[1:]], dim=1)  # (B, T, H)

    def backward(dy: Tensor) -> Tensor:
        dstate, da, db = layer.start(a), [], []
        for t in reversed(range(a.shape[1])):
            dstate = (dstate[0] + dy[:, t], *dstate[1:])
            da_t, db_t, dstate = cell_backward(a[:, t], made[t], states[t], states[t + 1], dstate)
            dstate = (dstate[0] + db_t @ layer.recur.weight, *dstate[1:])  # (B, G H) @ (G H, H) -> (B, H)
            da.append(da_t)
            db.append(db_t)
        rows = rows_of(torch.stack(db[::-1], dim=1))  # (B, T, G H) -> (B T, G H)
        before = rows_of(torch.stack([state[0] for state in states[:-1]], dim=1))  # (B T, H)
        grads.add(layer.recur.weight, rows.mT @ before.to(rows.dtype))
        grads.add(layer.recur.bias, precise(rows).sum(0))
        return linear_backward(layer.read, grads, x, torch.stack(da[::-1], dim=1))

    return y, backward


@rule(RNNLayer)
def rnn(layer: RNNLayer, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """h' = tanh(a + b): da = db = dh' (1 - h'²). What the state before gives comes through b alone."""

    def cell(a: Tensor, b: Tensor, before: State, after: State, dafter: State) -> Slopes:
        d = dafter[0] * (1 - after[0] * after[0])
        return d, d, (torch.zeros_like(d),)

    return through_time(layer, grads, x, cell)


@rule(GRULayer)
def gru(layer: GRULayer, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """h' = (1 - z) n + z h, with r = σ(a_r + b_r), z = σ(a_z + b_z) and n = tanh(a_n + r b_n).

    Product rule: dz = dh' (h - n), dn = dh' (1 - z), and h itself gets z dh'. With tanh' = 1 - n² and s the gradient
    inside the tanh, s = dn (1 - n²): da_n = s, db_n = s r, dr = s b_n. And σ' = σ (1 - σ).
    """

    def cell(a: Tensor, b: Tensor, before: State, after: State, dafter: State) -> Slopes:
        (a_r, a_z, a_n), (b_r, b_z, b_n), dh = a.chunk(3, dim=1), b.chunk(3, dim=1), dafter[0]
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        inside = dh * (1 - z) * (1 - n * n)
        dz = dh * (before[0] - n) * z * (1 - z)
        dr = inside * b_n * r * (1 - r)
        return torch.cat([dr, dz, inside], dim=1), torch.cat([dr, dz, inside * r], dim=1), (dh * z,)

    return through_time(layer, grads, x, cell)


@rule(LSTMLayer)
def lstm(layer: LSTMLayer, grads: Gradients, x: Tensor) -> tuple[Tensor, Backward]:
    """c' = f c + i g and h' = o tanh c', with i, f, o = σ(…) and g = tanh(…) of a + b.

    c' is read twice, by h' and by the next token: dc' gets dh' o (1 - tanh² c') in addition. Product rule: do = dh'
    tanh c', df = dc' c, di = dc' g, dg = dc' i; c gets f dc'. Nothing on the way of c is squashed or multiplied by a
    matrix, so its gradient does not vanish where f is near 1.
    """

    def cell(a: Tensor, b: Tensor, before: State, after: State, dafter: State) -> Slopes:
        i, f, g, o = (a + b).chunk(4, dim=1)
        i, f, g, o, bounded = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), after[1].tanh()
        dh, dc = dafter[0], dafter[1] + dafter[0] * o * (1 - bounded * bounded)
        di = dc * g * i * (1 - i)
        df = dc * before[1] * f * (1 - f)
        dg = dc * i * (1 - g * g)
        do = dh * bounded * o * (1 - o)
        d = torch.cat([di, df, dg, do], dim=1)  # (B, 4 H)
        return d, d, (torch.zeros_like(dh), dc * f)

    return through_time(layer, grads, x, cell)


@body(RNN)
@body(GRU)
@body(LSTM)
def recurrent(net: RNN, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """Layer upon layer; what goes through time is in each layer's rule."""
    check_length(tokens, net.block_size)
    x, backward_wte = run(net.wte, grads, tokens)  # (B, T) -> (B, T, C)
    backwards = [backward_wte]
    for layer in net.h:
        x, backward = run(layer, grads, x)  # (B, T, C) -> (B, T, H)
        x, backward_drop = run(net.drop, grads, x)
        backwards += [backward, backward_drop]
    return x, chained(backwards)
