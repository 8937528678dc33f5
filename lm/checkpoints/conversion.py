"""Weights of a GPT in another program's layout, and back: see `lm.checkpoints.layouts`."""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from lm.checkpoints.layouts import Json, Layout, Settings, said
from lm.errors import described
from lm.models import GPT

MOST_POSITIONS = 1 << 22  # a table of rotary positions has two rows for each


def shapes(settings: Settings, vocab_size: int, block_size: int) -> dict[str, torch.Size]:
    """Return the shape of each of a GPT's weights, without making them.

    Raises:
        ValueError: The settings are none that a GPT can have.
    """
    try:
        with torch.device("meta"):
            net = GPT(vocab_size, block_size, **settings)
    except RuntimeError as error:  # torch's, of more bytes than 64 bits can count
        raise ValueError(f"no tensor is as large as its sizes say ({described(error, 80)})") from error
    return {name: value.shape for name, value in net.state_dict().items()}


def widths(settings: Settings) -> list[int]:
    """Return the rows of queries, keys and values in a GPT's c_attn."""
    size = settings["n_embd"] // settings["n_head"]
    return [heads * size for heads in (settings["n_head"], *[settings["n_kv_head"] or settings["n_head"]] * 2)]


def outgoing(
    layout: Layout, settings: Settings, block_size: int, weights: dict[str, Tensor], config: Json
) -> Iterator[tuple[str, Tensor]]:
    """Yield a GPT's weights under the names and in the shapes of a layout; biases that it lacks are zeros.

    Args:
        layout: Which.
        settings: GPT's.
        block_size: GPT's.
        weights: GPT's.
        config: The layout's config.json.
    """
    rows, kind = weights["wte.weight"].shape[0], weights["wte.weight"].dtype
    biased = settings | {"bias": True, "attention_bias": True}
    for key, shape in shapes(biased, rows, block_size).items():
        if not layout.has(key, config) or (key == "lm_head.weight" and settings["tie_weights"]):
            continue
        value = weights[key] if key in weights else torch.zeros(shape, dtype=kind)
        part = layout.part(key)
        pieces = value.split(widths(settings)) if len(part.names) == 3 else (value,)
        for name, piece in zip(part.names, pieces, strict=True):
            yield name, (piece.T if part.transposed else piece).contiguous()


class Reader:
    """Takes tensors of a layout by their names, each once, and checks their shapes.

    Args:
        layout: Which.
        names: Of all tensors that there are.
        read: Returns one of them.
        said: Where their shapes are said.
    """

    def __init__(
        self, layout: Layout, names: Collection[str], read: Callable[[str], Tensor], said: str = "config.json"
    ) -> None:
        self.layout, self.left, self.read, self.said = layout, set(names), read, said
        self.headless = not any(name.startswith(layout.prefix) for name in names)

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor, in float32 unless it is in float64.

        Raises:
            ValueError: It is missing, or of another shape or type.
        """
        name = name.removeprefix(self.layout.prefix) if self.headless else name
        if name not in self.left:
            raise ValueError(f"it has no tensor {name}, which {self.said} makes {tuple(shape)}")
        value = self.read(name)
        if value.is_meta or value.layout != torch.strided or value.untyped_storage().nbytes() < value.nbytes:
            raise ValueError(f"its tensor {name} is no plain one, with a number in each place")
        if value.shape != shape:
            raise ValueError(f"its tensor {name} is {tuple(value.shape)}, and {self.said} makes it {tuple(shape)}")
        if value.dtype not in KINDS:
            raise ValueError(f"its tensor {name} is of {_kind(value.dtype)}: lm reads {', '.join(map(_kind, KINDS))}")
        self.left.discard(name)
        return value if value.dtype == torch.float64 else value.float()

    def finish(self) -> None:
        """Raise a ValueError where a tensor is left that has no place."""
        names = (name.removeprefix(self.layout.prefix) for name in sorted(self.left))
        if strange := next((name for name in names if not self.layout.buffers.fullmatch(name)), None):
            raise ValueError(f"its tensor {strange} has no place in {self.layout.name}")


KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def incoming(reader: Reader, settings: Settings, ours: dict[str, torch.Size], config: Json) -> dict[str, Tensor]:
    """Return a layout's weights as GPT has them.

    Args:
        reader: Has them.
        settings: GPT's.
        ours: GPT's shapes.
        config: The config.json.

    Raises:
        ValueError: One is missing, of another shape or type, or has no place.
    """
    layout = reader.layout
    found: dict[str, Tensor] = {}
    for key, shape in ours.items():
        part = layout.part(key)
        if key == "lm_head.weight" and settings["tie_weights"]:
            found[key] = found["wte.weight"]
            if key in reader.left and not torch.equal(reader.take(key, shape), found[key]):
                raise ValueError(f"its tensor {key} is another than the embedding, and {reader.said} ties them")
        elif not layout.has(key, config):
            found[key] = torch.zeros(shape, dtype=found["wte.weight"].dtype)
        elif len(part.names) == 3:
            parts = zip(part.names, widths(settings), strict=True)
            found[key] = torch.cat([reader.take(name, torch.Size((rows, *shape[1:]))) for name, rows in parts])
        else:
            value = reader.take(part.names[0], shape[::-1] if part.transposed else shape)
            found[key] = (value.T if part.transposed else value).contiguous()
    reader.finish()
    return found


def network(layout: Layout, config: Json, reader: Reader) -> tuple[Settings, dict[str, Tensor], int, int]:
    """Return the GPT that a layout's configuration and tensors are: settings, weights, vocab_size, block_size.

    Args:
        layout: Which.
        config: The keys of a config.json, and under `OURS` the settings that have no place there.
        reader: Has the tensors.

    Raises:
        ValueError: It says what is wrong, or what lm has no equal of.
    """
    try:
        settings, vocab_size, block_size = layout.settings(config)
        beside = said(config)
    except ValueError as error:
        raise ValueError(f"{reader.said}: {error}") from error
    if settings["n_layer"] > len(reader.left):  # before any is made
        raise ValueError(f"{reader.said} says {settings['n_layer']} layers, and there are {len(reader.left)} tensors")
    if block_size > MOST_POSITIONS:
        raise ValueError(f"{reader.said} says {block_size} positions, and lm takes {MOST_POSITIONS}")
    weights = incoming(reader, settings, shapes(settings, vocab_size, block_size), config)
    if beside is not None:
        ours = shapes(settings | beside, vocab_size, block_size)
        weights, settings = without_zeros(weights, settings, beside, ours)
    return settings, weights, vocab_size, block_size


def without_zeros(
    found: dict[str, Tensor], settings: Settings, beside: Settings, ours: dict[str, torch.Size]
) -> tuple[dict[str, Tensor], Settings]:
    """Return weights and settings of the GPT that was exported: without biases that it had not, if they still are zero.

    Args:
        found: The weights.
        settings: GPT's.
        beside: The settings that the layout has no place for.
        ours: The shapes of a GPT with those.
    """
    if any(key not in ours and value.any() for key, value in found.items()):
        return found, settings
    return {key: found[key] for key in ours}, settings | beside
