"""Recurrent networks: a state goes from token to token, and is all that a position knows of those before it.

Elman, "Finding Structure in Time" (1990); Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997); Cho et al.,
"Learning Phrase Representations" (2014). Weights are laid out as torch's own nn.RNN, nn.GRU and nn.LSTM have them.

Shapes: B batch, T time, C channels that a layer reads, H channels of its state (n_hidden), G gates, V vocabulary.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lm.bounds import checked
from lm.models.cache import Cache
from lm.models.dropout import Dropout
from lm.models.layers import check_length

State = tuple[Tensor, ...]


class Recurrent(nn.Module, ABC):
    """A recurrent layer: `cell` makes each state of the one before it, and of what is read.

    Args:
        n_in: Channels that it reads, C.
        n_hidden: Channels of its state, H.
    """

    n_gates = 1
    n_states = 1

    def __init__(self, n_in: int, n_hidden: int) -> None:
        super().__init__()
        self.n_hidden = n_hidden
        self.read = nn.Linear(n_in, self.n_gates * n_hidden)
        self.recur = nn.Linear(n_hidden, self.n_gates * n_hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(n_hidden**-0.5), n_hidden**-0.5)

    @abstractmethod
    def cell(self, a: Tensor, b: Tensor, state: State) -> State:
        """Return the next state.

        Args:
            a: (B, G H), a linear map of the input.
            b: (B, G H), a linear map of the state's first part.
            state: Each (B, H).
        """

    def start(self, a: Tensor) -> State:
        """Return the state before the first token, zeros, for inputs a (B, T, G H)."""
        return (a.new_zeros(len(a), self.n_hidden),) * self.n_states

    def inputs(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to what the cell reads of it, (B, T, G H); under autocast, too, in the weights' digits."""
        return self.read(x).to(self.read.weight.dtype)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to the states after each position, (B, T, H); the cache has the state before the first."""
        a = self.inputs(x)
        state = self.start(a) if cache is None else cache.state(self) or self.start(a)
        states = []
        for a_t in a.unbind(1):  # (B, G H)
            state = self.cell(a_t, self.recur(state[0]), state)
            states.append(state[0])
        if cache is not None:
            cache.keep_state(self, state)
        return torch.stack(states, dim=1)  # T of (B, H) -> (B, T, H)


class RNNLayer(Recurrent):
    """h' = tanh(W x + U h)."""

    def cell(self, a: Tensor, b: Tensor, state: State) -> State:
        """Return h'."""
        return (torch.tanh(a + b),)


class GRULayer(Recurrent):
    """h' = (1 - z) n + z h: how much of the state is kept, z, is decided anew at each token."""

    n_gates = 3

    def cell(self, a: Tensor, b: Tensor, state: State) -> State:
        """Return h'; the gates are r, z and n."""
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, dim=1), b.chunk(3, dim=1)  # each (B, H)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return ((1 - z) * n + z * state[0],)


class LSTMLayer(Recurrent):
    """c' = f c + i g, h' = o tanh c': what is remembered, c, is only ever scaled and added to."""

    n_gates = 4
    n_states = 2

    def cell(self, a: Tensor, b: Tensor, state: State) -> State:
        """Return h' and c'; the gates are i, f, g and o."""
        i, f, g, o = (a + b).chunk(4, dim=1)  # each (B, H)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class RNN(nn.Module):
    """Embeddings, layers that are recurrent, and a linear head.

    Args:
        vocab_size: Number of different tokens, V.
        block_size: Longest sequence.
        n_embd: Width of an embedding.
        n_hidden: Width of a state.
        n_layer: Number of recurrent layers.
        dropout: Probability of dropping an element of what a layer makes.

    Raises:
        ValueError: A size is not positive, or dropout is outside [0, 1).
    """

    layer: type[Recurrent] = RNNLayer

    @checked()
    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        *,
        n_embd: int = 32,
        n_hidden: int = 128,
        n_layer: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.h = nn.ModuleList(self.layer(n_hidden if i else n_embd, n_hidden) for i in range(n_layer))
        self.drop = Dropout(dropout)
        self.lm_head = nn.Linear(n_hidden, vocab_size)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each position of tokens (B, T).

        Args:
            tokens: int64 (B, T), at most block_size with those before.
            cache: Has the layers' states after the tokens before these, and takes those after these.

        Raises:
            ValueError: They are more than block_size.
        """
        check_length(tokens if cache is None else cache.read(tokens), self.block_size)
        x = self.wte(tokens)  # (B, T) -> (B, T, C)
        for layer in self.h:
            x = self.drop(layer(x) if cache is None else layer(x, cache))  # (B, T, C) -> (B, T, H)
        return self.lm_head(x)  # (B, T, H) -> (B, T, V)


class GRU(RNN):
    """The same with gates that decide what to keep: `GRULayer`."""

    layer = GRULayer


class LSTM(RNN):
    """The same with a second state that remembers: `LSTMLayer`."""

    layer = LSTMLayer
