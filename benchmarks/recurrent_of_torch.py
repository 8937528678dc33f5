"""Networks as lm.models.RNN, GRU and LSTM, made of torch's own modules: benchmarks/recurrent.py trains them."""

from torch import Tensor, nn


class TorchRNN(nn.Module):
    """An `lm.models.RNN` whose layer is torch's; for its arguments see there."""

    layer: type[nn.RNNBase] = nn.RNN

    def __init__(self, vocab_size: int, block_size: int, *, n_embd: int, n_hidden: int, dropout: float) -> None:
        super().__init__()
        self.vocab_size, self.block_size = vocab_size, block_size
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.h = self.layer(n_embd, n_hidden, batch_first=True)
        self.drop = nn.Dropout(dropout)
        self.lm_head = nn.Linear(n_hidden, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token after each position of tokens (B, T)."""
        states, _ = self.h(self.wte(tokens))  # (B, T) -> (B, T, C) -> (B, T, H)
        return self.lm_head(self.drop(states))


class TorchGRU(TorchRNN):
    """The same of an `lm.models.GRU`."""

    layer = nn.GRU


class TorchLSTM(TorchRNN):
    """The same of an `lm.models.LSTM`."""

    layer = nn.LSTM
