"""GGUF, the file of llama.cpp: networks of the architectures llama and gpt2, to it and from it.

Read and written by the package gguf, from the extra `hf`. Of llama, the rows of queries and keys are in another order:
llama.cpp turns neighbouring channels, lm and Hugging Face those half a head apart.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm import outputs, storage
from lm.checkpoints import checkpoint, conversion, layouts, safetensors
from lm.checkpoints.foreign import Foreign
from lm.checkpoints.layouts import OURS, Json, Layout, Settings
from lm.checkpoints.schema import Saved
from lm.errors import UserError, setting
from lm.tokenizers import BytePairTokenizer, CharTokenizer, Tokenizer, from_state
from lm.tokenizers import huggingface as tokenizer_files
from lm.tokenizers.published import GPT2_PATTERN, O200K_PATTERN
from lm.tokenizers.tokenizer import END_OF_TEXT

MAGIC = b"GGUF"
MARK = "lm.settings"
"""The key of a file that lm wrote: GPT's settings that have no place there."""
TOP = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
BLOCK = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.w_up": "ffn_up",
    "mlp.w_gate": "ffn_gate",
    "mlp.c_proj": "ffn_down",
}
"""GPT's names and GGUF's, of the network and of a block."""
KEYS = {
    "gpt2": {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "llama": {
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
        "rope.dimension_count": "head_dim",
    },
}
"""GGUF's keys, without the architecture in front, and those of a config.json."""
PATTERNS = {
    "gpt-2": GPT2_PATTERN,
    "smollm": tokenizer_files.DIGITS_PATTERN,
    "llama-bpe": tokenizer_files.LLAMA3_PATTERN,
    "gpt-4o": O200K_PATTERN,
}
"""llama.cpp's names of the patterns that cut words."""
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Tokens that a chat template may name, and GGUF's keys of them."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of tokens
NO_MERGES = ["\u0100 \u0100"]  # of two zero bytes, which no text has: llama.cpp does not take an empty list
LLAMA_CPP_END = 11  # what llama.cpp takes for the end of text where a file does not say


class _Names(Layout):
    """GGUF's names, of a layout whose keys of a config.json stay as they are."""

    prefix, buffers = "", re.compile(r"(?!)")
    heads: tuple[str, ...]
    """The names of what makes queries, keys and values."""

    def part(self, key: str) -> layouts.Part:
        """Return where a weight is."""
        name, _, kind = key.rpartition(".")
        if name in TOP:
            return layouts.Part((f"{TOP[name]}.{kind}",))
        found = re.fullmatch(r"h\.(\d+)\.(.*)", name)
        assert found
        names = self.heads if found[2] == "attn.c_attn" else (BLOCK[found[2]],)
        return layouts.Part(tuple(f"blk.{found[1]}.{one}.{kind}" for one in names))


class GPT2(_Names, layouts.GPT2):
    """GPT-2 in GGUF, whose activation is always the one by tanh."""

    heads = ("attn_qkv",)

    def holds(self, settings: Settings) -> dict[str, Any]:
        """Return what it holds."""
        return super().holds(settings) | {"feed_forward": ("gelu",)}


class LLaMA(_Names, layouts.LLaMA):
    """LLaMA in GGUF."""

    heads = ("attn_q", "attn_k", "attn_v")


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (GPT2(), LLaMA())}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("the package gguf is missing: pip install lm[hf]") from error
    return gguf


def interleaved(value: Tensor, heads: int) -> Tensor:
    """Return rows of queries or keys (H D, …) with channels i and i + D/2 of each head as neighbours."""
    rows: Tensor = value.unflatten(0, (heads, 2, -1))
    return rows.transpose(1, 2).reshape(value.shape)


def half_split(value: Tensor, heads: int) -> Tensor:
    """Return what `interleaved` was made from."""
    rows: Tensor = value.unflatten(0, (heads, -1, 2))
    return rows.transpose(1, 2).reshape(value.shape)


def _reordered(name: str, value: Tensor, config: Json, how: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return a tensor of llama whose rows are in the other order, if it makes queries or keys."""
    for part, key in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        if f".{part}." in name and key in config:
            return how(value, config[key])
    return value


def read_gguf(source: Path, with_tokenizer: bool = True) -> Foreign:
    """Return what a GGUF file holds: a network of one of `LAYOUTS`, in float32, and its tokenizer.

    Args:
        source: The file.
        with_tokenizer: Whether its tokenizer is read.

    Raises:
        ValueError: It says what is wrong, or what lm has no equal of.
        UserError: The package gguf is missing.
    """
    gguf = _package()
    try:
        file = gguf.GGUFReader(storage.plain(source))
        values = {name: field.contents() for name, field in file.fields.items()}
        tensors = {tensor.name: tensor for tensor in file.tensors}
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"it is damaged, or no GGUF file ({type(error).__name__}: {str(error)[:80]})") from error
    kind = values.get("general.architecture")
    if kind not in LAYOUTS:
        raise ValueError(f"its architecture is {str(kind)[:80]}, and lm knows {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    config = _config(kind, values, set(tensors))

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        value = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        return _reordered(name, value, config, half_split)

    found = conversion.network(layout, config, conversion.Reader(layout, tensors, read, "its header"))
    return Foreign(*found, _tokenizer(values) if with_tokenizer else None)


def _config(kind: str, values: dict[str, Any], names: set[str]) -> Json:
    """Return the keys of a config.json; numbers of 32 bits as they were written."""
    found = {theirs: values.get(f"{kind}.{key}") for key, theirs in KEYS[kind].items()}
    config: Json = {name: float(str(np.float32(v))) if isinstance(v, float) else v for name, v in found.items()}
    config |= {
        "vocab_size": config["vocab_size"] or len(values.get("tokenizer.ggml.tokens", ())),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "rope_scaling": {"type": values.get(f"{kind}.rope.scaling.type", "none").replace("none", "default")},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    }
    if isinstance(said := values.get(MARK), str):
        config[OURS] = json.loads(said)
    return {name: value for name, value in config.items() if value is not None}


def _tokenizer(values: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a GGUF file, None where it has none.

    Raises:
        ValueError: lm has no equal of it.
    """
    tokens: list[str] | None = values.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    if (model := values.get("tokenizer.ggml.model")) != "gpt2":
        raise ValueError(f"its tokenizer cannot be held: its model is {model}, and lm holds byte-level BPE, gpt2")
    types = values.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"its tokenizer has {len(tokens):,} tokens, and types of {len(types):,}")
    merges, pre = values.get("tokenizer.ggml.merges", []), values.get("tokenizer.ggml.pre", "gpt-2")
    begins = values.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")  # as llama.cpp has it
    if begins or values.get("tokenizer.ggml.add_eos_token"):
        raise ValueError("its tokenizer cannot be held: it adds tokens to each text")
    added = [
        {"content": name, "id": i}
        for i, (name, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    vocab = {name: i for i, (name, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    end = values.get("tokenizer.ggml.eos_token_id")
    settings = {} if end is None or not 0 <= end < len(tokens) else {"eos_token": tokens[end]}
    try:
        merges = [] if merges == NO_MERGES else merges
        if not merges and len(vocab) < 256:
            return _with_chat(tokenizer_files.of_symbols(vocab, added, settings), values, tokens)
        if pre not in PATTERNS:
            raise ValueError(f"it cuts words as {pre}, and lm does as {', '.join(PATTERNS)}")
        bytes_alone = not merges and added == [{"content": END_OF_TEXT, "id": 256}]
        words = tokenizer_files.NO_WORDS if bytes_alone else tokenizer_files.WORDS[PATTERNS[pre]]
        whole = {
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
            "added_tokens": added,
        }
        return _with_chat(tokenizer_files.from_files(whole, settings), values, tokens)
    except ValueError as error:
        raise ValueError(f"its tokenizer cannot be held: {error}") from error


def _with_chat(tokenizer: Tokenizer, values: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Return a tokenizer with the chat template of a GGUF file, if there is one, and the tokens that it may name."""
    ids = {name: values.get(f"tokenizer.ggml.{key}_token_id", -1) for name, key in NAMED.items()}
    named = {name: tokens[i] if 0 <= i < len(tokens) else None for name, i in ids.items()}
    tokenizer.chat = tokenizer_files.chat_of({"chat_template": values.get("tokenizer.chat_template"), **named})
    return tokenizer


def export_gguf(ckpt_path: Path, output: Path, *, overwrite: bool = False, note: Callable[[str], None] = print) -> Path:
    """Write the network of a checkpoint as a GGUF file, in float32, for llama.cpp.

    Args:
        ckpt_path: The checkpoint, single-file or sharded.
        output: A new file.
        overwrite: Whether it may replace an earlier export.
        note: Called with a line about what is worth knowing.

    Raises:
        UserError: The checkpoint is damaged or no GPT, it has a setting or a tokenizer that GGUF does not hold, the
            package gguf is missing, or the file is not free or cannot be written to.
    """
    gguf = _package()
    outputs.check_free(output, made="GGUF file", ours=_is_export, overwrite=overwrite)
    loaded = checkpoint.load(ckpt_path)
    with checkpoint.of_lm(ckpt_path):
        saved = Saved.of(loaded)
        safetensors.refuse_scores(saved, ckpt_path)
        weights, tokenizer = saved.weights, from_state(saved.tokenizer)
        try:
            settings, layout = layouts.choose(saved.net, LAYOUTS)
            vocabulary = _vocabulary(tokenizer)
        except ValueError as error:
            raise UserError(f"checkpoint {ckpt_path}: {error}: export it as safetensors") from error
        hidden = weights["h.0.mlp.c_proj.weight"].shape[1]  # (C, M)
        config = layout.config(settings | {"hidden_size": hidden}, saved.vocab_size, saved.block_size)
        theirs = dict(conversion.outgoing(layout, settings, saved.block_size, weights, config))
    safetensors.note_not_finite(ckpt_path, weights, note)
    if tokenizer.eot is None and tokenizer.n_vocab > LLAMA_CPP_END:
        symbol = tokenizer.decode([LLAMA_CPP_END])
        note(
            f"{output}: its tokenizer has no end of text, and llama.cpp takes {symbol!r} for it: let it ignore the end"
        )
    try:
        with storage.folder_made(output.parent), storage.whole(output) as file:
            writer = gguf.GGUFWriter(file.name, layout.name)
            writer.add_string(MARK, json.dumps(layouts.unplaced(settings)))
            writer.add_name(str((saved.config or {}).get("name") or "lm"))
            for key, name in KEYS[layout.name].items():
                value = config[name]
                add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
                add(f"{layout.name}.{key}", value)
            for key, value in vocabulary.items():
                writer.add_key_value(f"tokenizer.ggml.{key}", *_typed(gguf, value))
            if tokenizer.chat:
                writer.add_chat_template(tokenizer.chat["chat_template"])
            for name, value in theirs.items():
                value = _reordered(name, value, config, interleaved)
                writer.add_tensor(name, value.float().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise UserError(f"{setting('output')} {output}: {error.strerror or error}: say another place") from error
    return output


def _typed(gguf: Any, value: Any) -> tuple[Any, ...]:
    """Return a value and its types, as the writer takes them."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        return value, kinds.ARRAY, kinds.STRING if isinstance(value[0], str) else kinds.INT32
    return value, {bool: kinds.BOOL, int: kinds.UINT32, str: kinds.STRING}[type(value)]


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the keys of a tokenizer, each token written in GPT-2's characters for bytes.

    Raises:
        ValueError: llama.cpp has no equal of it.
    """
    patterns = {pattern: name for name, pattern in PATTERNS.items()}
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.pattern not in patterns:
        raise ValueError(f"its pattern of words, {tokenizer.pattern!r}, has no name in llama.cpp")
    model = tokenizer_files.to_files(tokenizer, 1)["tokenizer.json"]["model"]
    wide = [one for one in tokenizer.symbols if not one.isascii()] if isinstance(tokenizer, CharTokenizer) else []
    if wide:
        raise ValueError(f"its symbol {wide[0]!r} has several bytes, and llama.cpp has no tokenizer of characters")
    characters = {byte: character for character, byte in tokenizer_files.byte_table().items()}
    table = tokenizer.token_bytes()
    names = {i: name for name, i in model["vocab"].items()}
    tokens = [
        "".join(characters[byte] for byte in token) or names.get(i, f"<|unused {i}|>") for i, token in enumerate(table)
    ]
    types = [NORMAL if token else CONTROL if i in names else UNUSED for i, token in enumerate(table)]
    ends = {} if tokenizer.eot is None else dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    chat = tokenizer.chat or {}
    ends |= {
        f"{key}_token_id": model["vocab"][chat[name]] for name, key in NAMED.items() if chat.get(name) in model["vocab"]
    }
    return {
        "model": "gpt2",
        "pre": patterns.get(getattr(tokenizer, "pattern", ""), "gpt-2"),
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in model.get("merges", ())] or NO_MERGES,
        "add_bos_token": False,
        **ends,
    }


def _is_export(path: Path) -> bool:
    """Return whether a file is what `export_gguf` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return head.startswith(MAGIC) and MARK.encode() in head
