"""The rule of the encoder that says a text's class.

Shapes: B batch, T time, C channels (n_embd).
"""

from torch import Tensor

from lm.backprop.linear import chained, positions
from lm.backprop.networks import body
from lm.backprop.rules import Backward, Gradients, once, run
from lm.models.encoder import Encoder, shares
from lm.models.layers import check_length
from lm.models.seq2seq import EncoderBlock


@body(Encoder)
def encoder(net: Encoder, grads: Gradients, tokens: Tensor) -> tuple[Tensor, Backward]:
    """y = Σ_t s_t x_t, where s_t is 1 / n at the n tokens that are read and 0 at others: dx_t = s_t dy."""
    check_length(tokens, net.block_size)
    read = net.read(tokens)  # (B, T)
    e, backward_wte = run(net.wte, grads, tokens)  # (B, T) -> (B, T, C)
    wpe, backward_wpe = positions(net.wpe, grads, tokens.shape[1])  # (T, C)
    backwards, x = list[Backward](), e + wpe
    for layer in (net.drop, *net.h, net.ln_f):
        mask = (read[:, None, None, :],) if isinstance(layer, EncoderBlock) else ()
        x, backward = run(layer, grads, x, *mask)
        backwards.append(backward)
    weights = shares(read, x.dtype)  # (B, T, 1)

    @once
    def backward_all(dy: Tensor) -> None:
        de = chained(backwards)(weights * dy.unsqueeze(1))  # (B, C) -> (B, T, C)
        backward_wpe(de)
        backward_wte(de)

    return (x * weights).sum(1), backward_all
