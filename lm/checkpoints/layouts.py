"""The networks of other programs that lm's GPT can be: Hugging Face's gpt2 and llama, in both directions.

A layout is a table: GPT's settings as the keys of a config.json, and each of GPT's weights as one or three of theirs.
"""

import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, NamedTuple

from lm.models import GPT

Settings = dict[str, Any]
Json = dict[str, Any]

OURS = "lm"
"""The key of a config.json that lm wrote: which biases the network has; the others are zeros there."""

UNPLACED = {"bias": bool, "attention_bias": bool, "dropout": float, "key_dropout": bool}
"""Settings of GPT that layouts have no place for."""


class Part(NamedTuple):
    """One of GPT's weights as another layout has it."""

    names: tuple[str, ...]
    """Theirs: one, or the queries', keys' and values'."""
    transposed: bool = False


class Layout(ABC):
    """One architecture of Hugging Face's."""

    name: str
    """Its model_type."""
    architecture: str
    """The class that transformers loads it as."""
    prefix: str
    """What its weights' names begin with; a file of the network without its head leaves it out."""
    tied: bool
    """Whether the head is the token embedding where a config.json does not say."""
    buffers: re.Pattern[str]
    """Names in older files that are no weights."""

    @abstractmethod
    def holds(self, settings: Settings) -> dict[str, Collection[Any]]:
        """Return the values of GPT's settings that this layout has a place for; any of those that are left out."""

    @abstractmethod
    def config(self, settings: Settings, vocab_size: int, block_size: int) -> Json:
        """Return GPT's settings, hidden_size a number, as the keys of a config.json."""

    @abstractmethod
    def settings(self, config: Json) -> tuple[Settings, int, int]:
        """Return GPT's settings, vocab_size and block_size from a config.json.

        Raises:
            ValueError: A key is missing or of another type, or says what lm's GPT does not do.
        """

    @abstractmethod
    def part(self, key: str) -> Part:
        """Return where one of GPT's weights is, by its name in the network."""

    def has(self, key: str, config: Json) -> bool:
        """Return whether a network of a config.json has the equal of one of GPT's weights; else that is zero there."""
        return True

    def lacks(self, settings: Settings) -> list[str]:
        """Return the settings, with their values, that this layout does not hold."""
        allowed = COMMON | self.holds(settings)
        return [f"{name} {_said(settings[name])}" for name, values in allowed.items() if settings[name] not in values]


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


COMMON: dict[str, Collection[Any]] = {
    "attention": ("batched",),
    "qk_norm": (False,),
    "projection": (True,),
    "residual": (True,),
    "norm_position": ("pre",),
    "logit_soft_cap": (None,),
    "head_bias": (False,),
    "document_end": (None,),
    "token_shift": (False,),
}
"""What neither layout has more than one value of."""
ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu": "relu", "relu_squared": "relu2"}
"""GPT's feed_forward, and the activation that gpt2 has for it."""
LLAMA = {
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w_gate": "mlp.gate_proj",
    "mlp.w_up": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
"""GPT's names, and llama's."""


def value_of(config: Json, key: str, kind: type, default: Any = None) -> Any:
    """Return a value of a config.json, checked to be of a type; the default where there is none.

    Raises:
        ValueError: It is missing and has no default, or is of another type.
    """
    value = config.get(key, default)
    value = default if value is None else value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (type(value) is int and value < 1):
        what = {int: "a whole number, at least 1", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"{key} is {json.dumps(value)[:80]}: it should be {what}")
    return value


def expected(config: Json, **values: Any) -> None:
    """Raise a ValueError where a config.json has another value for a key."""
    for key, value in values.items():
        found = config.get(key, value)
        if found != value:
            raise ValueError(f"{key} is {str(found)[:80]}, and lm's GPT has {value}")


class GPT2(Layout):
    """OpenAI's GPT-2: learned positions, LayerNorm, linear layers stored as (in, out), biases everywhere."""

    name, architecture, prefix, tied = "gpt2", "GPT2LMHeadModel", "transformer.", True
    buffers = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

    def holds(self, settings: Settings) -> dict[str, Collection[Any]]:
        """Return what it holds."""
        return {
            "positions": ("learned",),
            "norm": ("layer",),
            "feed_forward": tuple(ACTIVATIONS),
            "n_kv_head": (None, settings["n_head"]),
        }

    def config(self, settings: Settings, vocab_size: int, block_size: int) -> Json:
        """Return the keys of a config.json."""
        drop = settings["dropout"]
        return {
            "vocab_size": vocab_size,
            "n_positions": block_size,
            "n_embd": settings["n_embd"],
            "n_layer": settings["n_layer"],
            "n_head": settings["n_head"],
            "n_inner": settings["hidden_size"],
            "activation_function": ACTIVATIONS[settings["feed_forward"]],
            "layer_norm_epsilon": settings["norm_eps"],
            "tie_word_embeddings": settings["tie_weights"],
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), drop),
        }

    def settings(self, config: Json) -> tuple[Settings, int, int]:
        """Return GPT's settings."""
        expected(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        activation = value_of(config, "activation_function", str, "gelu_new")
        kinds = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}
        kind = kinds.get(activation)
        if kind is None:
            raise ValueError(f"activation_function is {activation}, and lm's GPT has {', '.join(kinds)}")
        dropouts = {value_of(config, key, float, 0.1) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        sizes = {key: value_of(config, key, int) for key in ("n_layer", "n_head", "n_embd")}
        settings = {
            **sizes,
            "hidden_size": value_of(config, "n_inner", int, 4 * sizes["n_embd"]),
            "feed_forward": kind,
            "norm_eps": value_of(config, "layer_norm_epsilon", float, 1e-5),
            "tie_weights": value_of(config, "tie_word_embeddings", bool, True),
            "dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,  # there are three, and lm has one
        }
        return settings, value_of(config, "vocab_size", int), value_of(config, "n_positions", int, 1024)

    def part(self, key: str) -> Part:
        """Return where a weight is: the names are the same."""
        if key == "lm_head.weight":
            return Part((key,))
        return Part((self.prefix + key,), bool(re.search(r"\.c_(attn|proj|fc)\.weight$", key)))


class LLaMA(Layout):
    """Meta's LLaMA: rotary positions, RMSNorm, a gated feed-forward network, grouped queries."""

    name, architecture, prefix, tied = "llama", "LlamaForCausalLM", "model.", False
    buffers = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

    def holds(self, settings: Settings) -> dict[str, Collection[Any]]:
        """Return what it holds."""
        return {"positions": ("rotary",), "norm": ("rms",), "feed_forward": ("swiglu",)}

    def config(self, settings: Settings, vocab_size: int, block_size: int) -> Json:
        """Return the keys of a config.json."""
        bias = settings["bias"]
        return {
            "vocab_size": vocab_size,
            "max_position_embeddings": block_size,
            "hidden_size": settings["n_embd"],
            "num_hidden_layers": settings["n_layer"],
            "num_attention_heads": settings["n_head"],
            "num_key_value_heads": settings["n_kv_head"] or settings["n_head"],
            "head_dim": settings["n_embd"] // settings["n_head"],
            "intermediate_size": settings["hidden_size"],
            "hidden_act": "silu",
            "rms_norm_eps": settings["norm_eps"],
            "rope_theta": settings["rope_theta"],  # for releases of transformers before 5
            "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_theta"]},
            "attention_bias": bias or bool(settings["attention_bias"]),
            "mlp_bias": bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": settings["tie_weights"],
        }

    def settings(self, config: Json) -> tuple[Settings, int, int]:
        """Return GPT's settings."""
        heads, width = value_of(config, "num_attention_heads", int), value_of(config, "hidden_size", int)
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in transformers' order
        expected(config, hidden_act="silu", partial_rotary_factor=1.0)
        expected({"head_dim": config.get("head_dim") or width // heads}, head_dim=width // heads)
        expected({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, rope_type="default")
        expected(rope, partial_rotary_factor=1.0)
        theta = value_of(config, "rope_theta", float, 10000.0)
        attention, mlp = (value_of(config, key, bool, False) for key in ("attention_bias", "mlp_bias"))
        settings = {
            "n_layer": value_of(config, "num_hidden_layers", int),
            "n_head": heads,
            "n_embd": width,
            "n_kv_head": value_of(config, "num_key_value_heads", int, heads),
            "hidden_size": value_of(config, "intermediate_size", int),
            "positions": "rotary",
            "norm": "rms",
            "feed_forward": "swiglu",
            "norm_eps": value_of(config, "rms_norm_eps", float, 1e-6),
            "rope_theta": value_of(rope, "rope_theta", float, theta),
            "tie_weights": value_of(config, "tie_word_embeddings", bool, False),
            "bias": attention or mlp,
            "attention_bias": attention,
        }
        return settings, value_of(config, "vocab_size", int), value_of(config, "max_position_embeddings", int, 2048)

    def has(self, key: str, config: Json) -> bool:
        """Return whether there is such a bias: those of attention and of the feed-forward network are two settings."""
        setting = "attention_bias" if ".attn." in key else "mlp_bias"
        return not key.endswith(".bias") or bool(config.get(setting))

    def part(self, key: str) -> Part:
        """Return where a weight is."""
        if key == "lm_head.weight":
            return Part((key,))
        name, _, kind = key.rpartition(".")
        found = re.fullmatch(r"h\.(\d+)\.(.*)", name)
        before, name = (f"{self.prefix}layers.{found[1]}.", found[2]) if found else (self.prefix, name)
        if name == "attn.c_attn":
            return Part(tuple(f"{before}self_attn.{one}_proj.{kind}" for one in "qkv"))
        return Part((f"{before}{LLAMA[name]}.{kind}",))


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (GPT2(), LLaMA())}


def settings_of(init_args: Settings) -> Settings:
    """Return GPT's settings with its defaults filled in."""
    parameters = inspect.signature(GPT).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | init_args


def unplaced(settings: Settings) -> Settings:
    """Return the settings of a GPT that no layout has a place for, as an export has them beside it."""
    return {name: settings[name] for name in UNPLACED}


def said(config: Json) -> Settings | None:
    """Return what an export has beside a layout's keys; None where another program wrote it.

    Raises:
        ValueError: A value is of another type.
    """
    found = config.get(OURS)
    if not isinstance(found, dict):
        return None
    inherited = ("attention_bias",) if found.get("attention_bias", 0) is None else ()  # null: as bias
    kinds = {name: kind for name, kind in UNPLACED.items() if name in found and name not in inherited}
    return dict.fromkeys(inherited) | {name: value_of(found, name, kind) for name, kind in kinds.items()}


def choose(net: dict[str, Any], layouts: dict[str, Layout]) -> tuple[Settings, Layout]:
    """Return a GPT's settings, defaults filled in, and the layout that holds them.

    Args:
        net: A network's class_path and init_args.
        layouts: By their names.

    Raises:
        ValueError: None does; the message names the settings. Or it is another network.
    """
    if net["class_path"] not in ("lm.models.GPT", "lm.models.gpt.GPT"):
        names = " and ".join(layouts)
        raise ValueError(f"its network is {net['class_path']}, and {names} hold lm.models.GPT alone")
    settings = settings_of(net.get("init_args") or {})
    lacking = {layout: layout.lacks(settings) for layout in layouts.values()}
    for layout, missing in lacking.items():
        if not missing:
            return settings, layout
    first, *others = lacking.values()
    if common := [one for one in first if all(one in other for other in others)]:
        raise ValueError(f"neither {' nor '.join(layouts)} holds {', '.join(common)}")
    raise ValueError("; ".join(f"{layout.name} does not hold {', '.join(each)}" for layout, each in lacking.items()))
