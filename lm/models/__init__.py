"""What a network computes: plain torch.nn modules, `forward(tokens) -> logits`, no loss, data or precision."""

from lm.models.bag_of_words import BagOfWords
from lm.models.bigram import Bigram
from lm.models.encoder import Encoder
from lm.models.gpt import GPT
from lm.models.mlp import MLP
from lm.models.recurrent import GRU, LSTM, RNN
from lm.models.seq2seq import Seq2Seq
from lm.models.wavenet import GatedWaveNet, WaveNet

__all__ = ["GPT", "GRU", "LSTM", "MLP", "RNN", "BagOfWords", "Bigram", "Encoder", "GatedWaveNet", "Seq2Seq", "WaveNet"]
