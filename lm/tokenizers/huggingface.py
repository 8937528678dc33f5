"""Tokenizers as Hugging Face's files: tokenizer.json and tokenizer_config.json, to them and from them.

Only what gives the same ids for every text goes over, in both directions; all else is an error that names it. One
difference remains: Hugging Face's tokenizers take the name of a special token in a text for that token, lm's never do.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from lm.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from lm.tokenizers.merges import from_text, to_text
from lm.tokenizers.published import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN
from lm.tokenizers.tokenizer import END_OF_TEXT

Json = dict[str, Any]
LONGEST = 8192  # bytes of a token; the time to check one grows with their square
LONGEST_TEMPLATE = 1 << 18  # bytes of a chat template and its tokens; the longest published ones have a tenth of that

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""LLaMA 3's, and OpenAI's older form of cl100k_base's, which splits a newline from spaces at a text's end."""
DIGITS_PATTERN = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?=\p{N})|\s+(?!\S)|\s"""
"""GPT-2's pattern between digits, each of which is a word: SmolLM2's and StarCoder's."""


_BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_WORDS: list[Json] = [_BYTE_LEVEL | {"use_regex": False}]
"""The pre-tokenizer of `byte`, whose text is one word."""


def _words(pattern: str) -> list[Json]:
    return [_split(pattern), *NO_WORDS]


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_CHARACTERS: list[Json] = [_split(r"[\s\S]")]
WORDS: dict[str, list[Json]] = {
    GPT2_PATTERN: [_BYTE_LEVEL],
    CL100K_PATTERN: _words(LLAMA3_PATTERN.replace(r"|\s*[", r"|\s+\z|\s*[")),  # no possessive quantifiers there
    LLAMA3_PATTERN: _words(LLAMA3_PATTERN),
    O200K_PATTERN: _words(O200K_PATTERN),
    DIGITS_PATTERN: [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}
"""How text is cut into words: lm's pattern, and the pre-tokenizers that cut at the same places."""


def byte_table() -> dict[str, int]:
    """Return the byte for each printable character by which `tokenizers`, like GPT-2, represents it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def to_files(tokenizer: Tokenizer, block_size: int) -> dict[str, Json]:
    """Return the contents of tokenizer.json and tokenizer_config.json.

    Raises:
        ValueError: The tokenizer cuts words by a pattern that Hugging Face's have no equal of.
    """
    special: dict[str, Any] = dict(tokenizer.special_ids)
    end = END_OF_TEXT if END_OF_TEXT in special else None
    if isinstance(tokenizer, CharTokenizer):
        symbols = {symbol: i for i, symbol in enumerate(tokenizer.symbols)}
        end = tokenizer.end or end
        model: Json = {"type": "WordLevel", "vocab": symbols | special, "unk_token": "[UNK]"}  # unknown ones: an error
        words, decoder = _CHARACTERS, {"type": "Fuse"}
    else:
        if isinstance(tokenizer, ByteTokenizer):
            ranks, words = {bytes([i]): i for i in range(256)}, NO_WORDS
        else:
            assert isinstance(tokenizer, BytePairTokenizer)
            if tokenizer.pattern not in WORDS:
                raise ValueError(f"its pattern of words, {tokenizer.pattern!r}, has no equal there")
            ranks, words = tokenizer.merge_table, WORDS[tokenizer.pattern]
            end = None if tokenizer.eot is None else tokenizer.end_of_text
        model, decoder = _byte_pairs(ranks, special), _BYTE_LEVEL
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": i, "content": name} | flags for name, i in sorted(special.items(), key=lambda item: item[1])]
    whole = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding"), None),
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": words[0] if len(words) == 1 else {"type": "Sequence", "pretokenizers": words},
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    ends = {} if end is None else {"bos_token": end, "eos_token": end}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **(tokenizer.chat or ends),
    }
    return {"tokenizer.json": whole, "tokenizer_config.json": settings}


def _byte_pairs(ranks: dict[bytes, int], special: dict[str, Any]) -> Json:
    """Return the BPE model of a merge table: each token is merged from the two that its own bytes come to."""
    character = {byte: character for character, byte in byte_table().items()}
    written = {token: "".join(character[byte] for byte in token) for token in ranks}
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    pairs = [pair for token, _ in ordered if (pair := halves(ranks, token))]
    return {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"), None),
        **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
        "ignore_merges": True,  # a word that is a token is that token, as in tiktoken
        "vocab": {written[token]: rank for token, rank in ordered} | special,
        "merges": [[written[left], written[right]] for left, right in pairs],
    }


def halves(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    """Return the two tokens of a lower rank that a token's bytes are merged to; None where they are not two."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, ranks[token]) for left, right in pairwise(parts)]
        lowest = min(found)
        if lowest >= ranks[token]:
            return None
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def of_gpt2(vocab: dict[str, int], merges: list[str]) -> Json:
    """Return what a tokenizer.json would hold, from the vocab.json and the lines of merges.txt that GPT-2 came with."""
    added = [{"content": END_OF_TEXT, "id": vocab[END_OF_TEXT]}] if END_OF_TEXT in vocab else []
    pairs = [line for line in merges if line and not line.startswith("#version")]
    return {
        "added_tokens": added,
        "pre_tokenizer": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }


def from_files(whole: Json, settings: Json) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json and a tokenizer_config.json.

    Raises:
        ValueError: It is one that lm has no equal of; the message says what.
        LookupError, TypeError, AttributeError: It is no such file.
    """
    model, words = whole["model"], _flat(whole.get("pre_tokenizer"))
    if _flat(whole.get("normalizer")):
        raise ValueError(f"its normalizer, {_kinds(whole['normalizer'])}, changes texts")
    _check_post_processor(whole.get("post_processor"))
    added = {one["content"]: int(one["id"]) for one in whole.get("added_tokens") or []}
    end = _end(settings, added)
    if model["type"] == "WordLevel" and words == _CHARACTERS:
        return _characters(model["vocab"], settings, added)
    if model.get("type") != "BPE":
        raise ValueError(f"its model is {model['type']}, and lm holds byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"its {name} is {model[name]}")
    vocab = {name: int(i) for name, i in model["vocab"].items()}
    if twice := next((name for name, i in added.items() if vocab.get(name, i) != i), None):
        raise ValueError(f"its token {twice!r} has two ids")
    ranks = _ranks({name: i for name, i in vocab.items() if name not in added})
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if words == NO_WORDS and not pairs and ranks == {bytes([i]): i for i in range(256)}:
        made = ByteTokenizer(name for name in sorted(added, key=added.__getitem__) if name != END_OF_TEXT)
        if made.special_ids == added:
            return made
    pattern = next((pattern for pattern, known in WORDS.items() if known == words), None)
    if pattern is None:
        raise ValueError(f"its pre_tokenizer, {_kinds(whole.get('pre_tokenizer'))}, cuts words as none of lm's does")
    _check_merges(ranks, pairs)
    return of_ranks(ranks, added, end, pattern)


def chat_of(settings: Json, file: str | None = None) -> dict[str, str] | None:
    """Return a tokenizer's `chat`, None where it has no chat template.

    Args:
        settings: The tokenizer_config.json: its template is a text, or the one named default of several.
        file: The chat_template.jinja, which comes before that.

    Raises:
        ValueError: The template is no text, or too long to be one.
    """
    said = settings.get("chat_template") if file is None else file
    if isinstance(said, list):
        said = {one["name"]: one["template"] for one in said}
    template = said.get("default") if isinstance(said, dict) else said
    if template is None:
        return None
    usual = ("bos_token", "eos_token", "unk_token") if settings.get("tokenizer_class", "GPT2")[:4] == "GPT2" else ()
    tokens = {**dict.fromkeys(usual, END_OF_TEXT), **{k: v for k, v in settings.items() if k.endswith("_token")}}
    named = {name: one["content"] if isinstance(one, dict) else one for name, one in tokens.items()}
    chat = {"chat_template": template} | {name: one for name, one in named.items() if isinstance(one, str)}
    try:
        size = sum(len(one.encode()) for one in chat.values())
    except (AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f"its chat_template is no text ({type(error).__name__})") from error
    if size > LONGEST_TEMPLATE:
        raise ValueError(f"its chat_template and its tokens have {size:,} bytes, and lm keeps {LONGEST_TEMPLATE:,}")
    return chat


def of_symbols(vocab: dict[str, int], added: list[Json], settings: Json) -> Tokenizer:
    """Return the tokenizer of single characters, each a byte and written in GPT-2's characters for bytes.

    Raises:
        ValueError: It is another one.
    """
    table = byte_table()
    symbols = {bytes(map(table.__getitem__, name)).decode("latin-1"): i for name, i in vocab.items()}
    special = {one["content"]: one["id"] for one in added}
    if end := settings.get("eos_token"):
        settings = {"eos_token": end if end in special else chr(table[end])}
    model = {"type": "WordLevel", "vocab": symbols | special}
    return from_files({"model": model, "pre_tokenizer": _CHARACTERS[0], "added_tokens": added}, settings)


def of_ranks(ranks: dict[bytes, int], special: dict[str, int], end: str | None, pattern: str) -> BytePairTokenizer:
    """Return the byte-pair tokenizer of ids; its special tokens are left out where they are the usual one.

    Raises:
        ValueError: The ids are not those of a merge table and special tokens, or the ends are no special token.
    """
    text = to_text(ranks)
    if special == {END_OF_TEXT: len(ranks)}:
        tokenizer = BytePairTokenizer(text, pattern)
    else:
        tokenizer = BytePairTokenizer(text, pattern, dict(sorted(special.items())), end or END_OF_TEXT)
    from_text(text, special.values(), every_byte=False)
    return tokenizer


def _flat(part: Json | None) -> list[Json]:
    """Return the parts of a normalizer or a pre-tokenizer, in order, without what makes no difference to ids."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        parts = [*part.get("pretokenizers", ()), *part.get("normalizers", ())]
        return [one for each in parts for one in _flat(each)]
    return [{"use_regex": True} | part | {"trim_offsets": True} if part["type"] == "ByteLevel" else part]


def _kinds(part: Json | None) -> str:
    return " and ".join(str(one["type"]) for one in _flat(part)) or "none"


def _check_post_processor(part: Json | None) -> None:
    """Raise a ValueError where tokens are added to each text."""
    parts: list[Json] = part.get("processors", [part]) if part else []
    for one in parts:
        adds = [str(piece) for piece in one.get("single", []) if "SpecialToken" in piece]
        if one["type"] not in ("ByteLevel", "TemplateProcessing") or adds:
            raise ValueError(f"its post_processor, {one['type']}, adds tokens to each text")


def _end(settings: Json, added: Iterable[str]) -> str | None:
    """Return the name of the token that ends a text, None where there is none."""
    end = settings.get("eos_token")
    end = end["content"] if isinstance(end, dict) else end
    if not isinstance(end, str | None):
        raise ValueError(f"its eos_token is {str(end)[:80]}, which is no text")
    return end or (END_OF_TEXT if END_OF_TEXT in added else None)


def _characters(vocab: dict[str, int], settings: Json, added: dict[str, int]) -> CharTokenizer:
    ends = END_OF_TEXT in vocab
    special = [name for name in sorted(added, key=added.__getitem__) if name != END_OF_TEXT and len(name) > 1]
    symbols = [name for name in vocab if name != END_OF_TEXT and name not in special]
    end = _end(settings, ()) if not ends else None
    tokenizer = CharTokenizer(symbols, end if end in symbols else None, ends, special)
    known = {symbol: i for i, symbol in enumerate(tokenizer.symbols)} | tokenizer.special_ids
    if known != vocab or any(vocab.get(name) != i for name, i in added.items()):
        raise ValueError("its vocabulary is not one of characters in their order")
    return tokenizer


def _ranks(vocab: dict[str, int]) -> dict[bytes, int]:
    table = byte_table()
    foreign = next((name for name in vocab if any(character not in table for character in name)), None)
    if foreign is not None:
        raise ValueError(f"its token {foreign!r} is not written in bytes, so it is no byte-level BPE")
    return {bytes(table[character] for character in name): i for name, i in vocab.items()}


def _check_merges(ranks: dict[bytes, int], pairs: list[list[str]]) -> None:
    """Raise a ValueError unless merging in the order of ids gives what merging in the order of the pairs gives."""
    table = byte_table()
    merged = [tuple(bytes(table[character] for character in part) for part in pair) for pair in pairs]
    ids = [ranks[b"".join(pair)] for pair in merged]
    if wrong := [pair for pair, (one, other) in zip(pairs[1:], pairwise(ids), strict=True) if one > other]:
        raise ValueError(f"its merge {' + '.join(wrong[0])} comes after one of a higher id")
    known = set(merged)
    for token in ranks:
        if len(token) > LONGEST:
            raise ValueError(f"one of its tokens has {len(token):,} bytes")
        if len(token) > 1 and halves(ranks, token) not in known:
            raise ValueError(f"its token {token!r} is not made by its merges")
