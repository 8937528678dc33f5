"""Tokenizers: text to token ids and back. They are saved as plain strings, never pickled.

To add one, write a subclass of `Tokenizer` in a file of its own, and add it to KINDS.
"""

from lm.tokenizers.byte import ByteTokenizer
from lm.tokenizers.byte_pair import BytePairTokenizer
from lm.tokenizers.char import CharTokenizer
from lm.tokenizers.kinds import CHAT, KINDS, from_state, identity, load_tokenizer, make, to_state
from lm.tokenizers.tokenizer import Decoder, Tokenizer

__all__ = [
    "CHAT",
    "KINDS",
    "BytePairTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Decoder",
    "Tokenizer",
    "from_state",
    "identity",
    "load_tokenizer",
    "make",
    "to_state",
]
