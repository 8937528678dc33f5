"""Checkpoints as folders of Hugging Face's transformers, to them and from them, without transformers itself.

No file of such a folder is run: safetensors and JSON hold no code, and a .bin is read by torch's weights_only.

`lm.checkpoints.layouts` has the networks, `lm.tokenizers.huggingface` the tokenizers.
"""

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lm import storage
from lm.checkpoints import checkpoint, conversion, layouts, safetensors
from lm.checkpoints.foreign import Foreign, load_weights_only
from lm.checkpoints.layouts import OURS, Json, Layout, Settings
from lm.checkpoints.schema import Saved
from lm.errors import UserError, described
from lm.tokenizers import Tokenizer, from_state
from lm.tokenizers import huggingface as tokenizer_files

WEIGHTS, CONFIG, GENERATION, CARD = "model.safetensors", "config.json", "generation_config.json", "README.md"
TEMPLATE = "chat_template.jinja"
BIN, INDEX = "pytorch_model.bin", ".index.json"
NAMES = r"model\.safetensors|(generation_|tokenizer_)?config\.json|tokenizer\.json|README\.md"
LARGEST = 1 << 28  # bytes of a JSON file; those of published tokenizers have a tenth of that


def export_huggingface(
    ckpt_path: Path, output: Path, *, overwrite: bool = False, note: Callable[[str], None] = print
) -> Path:
    """Write the network of a checkpoint as a folder that transformers loads, as GPT-2 or as LLaMA.

    Args:
        ckpt_path: The checkpoint, single-file or sharded.
        output: A new folder.
        overwrite: Whether it may replace an earlier export.
        note: Called with a line about weights that are not finite: they are exported as they are.

    Raises:
        UserError: The checkpoint is damaged or no GPT, it has a setting or a tokenizer that neither layout holds, or
            the folder is not free or cannot be written to.
    """
    safetensors.check_folder(output, NAMES, _is_export, overwrite=overwrite)
    loaded = checkpoint.load(ckpt_path)
    with checkpoint.of_lm(ckpt_path):
        saved = Saved.of(loaded)
        safetensors.refuse_scores(saved, ckpt_path)
        weights, tokenizer = saved.weights, from_state(saved.tokenizer)
        try:
            settings, layout = layouts.choose(saved.net, layouts.LAYOUTS)
            files = tokenizer_files.to_files(tokenizer, saved.block_size)
        except ValueError as error:
            raise UserError(f"checkpoint {ckpt_path}: {error}: export it as safetensors") from error
        config = _config(layout, settings, saved, tokenizer)
        theirs = dict(conversion.outgoing(layout, settings, saved.block_size, weights, config))
    safetensors.note_not_finite(ckpt_path, weights, note)
    texts = {CONFIG: config, GENERATION: _ends(tokenizer) | {"pad_token_id": tokenizer.eot}, **files}
    data = {name: (json.dumps(text, indent=2, ensure_ascii=False) + "\n").encode() for name, text in texts.items()}
    card = _card(saved, layout, sum(value.numel() for value in theirs.values())).encode()
    safetensors.write_folder(output, NAMES, {WEIGHTS: save(theirs, {"format": "pt"}), **data, CARD: card})
    return output


def _is_export(path: Path) -> bool:
    """Return whether a folder is what `export_huggingface` wrote, and has nothing else."""
    with suppress(OSError, ValueError, TypeError):
        return storage.holds_only(path, NAMES) and OURS in json.loads(storage.plain(path / CONFIG).read_text())
    return False


def _ends(tokenizer: Tokenizer) -> Json:
    """Return the ids that begin and end a text: null where there are none, or GPT-2's 50256 would be taken."""
    return {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.end_of_turn}


def _config(layout: Layout, settings: Settings, saved: Saved, tokenizer: Tokenizer) -> Json:
    hidden = saved.weights["h.0.mlp.c_proj.weight"].shape[1]  # (C, M)
    return {
        "architectures": [layout.architecture],
        "model_type": layout.name,
        "dtype": str(saved.weights["wte.weight"].dtype).removeprefix("torch."),
        **layout.config(settings | {"hidden_size": hidden}, saved.vocab_size, saved.block_size),
        **_ends(tokenizer),
        OURS: layouts.unplaced(settings),
    }


def _card(saved: Saved, layout: Layout, parameters: int) -> str:
    """Return the model card: what it is, what it reached, how it was made."""
    figures = {"parameters": f"{parameters:,}", "optimizer steps": f"{saved.step:,}"}
    names = {"loss": "validation loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    figures |= {said: f"{saved.validation[name]:.4f}" for name, said in names.items() if name in saved.validation}
    if corpus := (saved.data.get("init_args") or {}).get("corpus"):
        figures["corpus"] = str(corpus)
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    recipe = yaml.safe_dump(saved.config, sort_keys=False, allow_unicode=True)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [lm, {layout.name}]
---
# {(saved.config or {}).get("name") or "A language model"}

A GPT trained with lm, in the layout `{layout.name}`.

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

The recipe:

```yaml
{recipe}```
"""


def read_huggingface(source: Path, with_tokenizer: bool = True) -> Foreign:
    """Return what a folder of transformers holds: a network of one of `layouts.LAYOUTS`, and its tokenizer.

    Args:
        source: A folder with config.json, safetensors or a pytorch_model.bin, single or sharded, and a tokenizer.
        with_tokenizer: Whether its tokenizer is read.

    Raises:
        ValueError: It says what is wrong, or what lm has no equal of.
        OSError, LookupError, TypeError, AttributeError, ArithmeticError: It is no such folder.
    """
    config = _json(source / CONFIG)
    layout = layouts.LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        known = ", ".join(layouts.LAYOUTS)
        raise ValueError(f"its model_type is {str(config.get('model_type'))[:80]}, and lm knows {known}")
    names, read = _tensors(source)
    found = conversion.network(layout, config, conversion.Reader(layout, names, read))
    return Foreign(*found, _tokenizer(source) if with_tokenizer else None)


def _sized(path: Path) -> Path:
    """Return the path of a text; raises OSError where it cannot be read, and ValueError where it is too large."""
    if (size := storage.plain(path).stat().st_size) > LARGEST:
        raise ValueError(f"{path.name} has {size:,} bytes, which is too large for what it should be")
    return path


def _json(path: Path) -> Json:
    """Return the object that a JSON file holds; raises OSError or ValueError where it is none."""
    path = _sized(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def _tensors(source: Path) -> tuple[Collection[str], Callable[[str], Tensor]]:
    """Return the names of a folder's tensors, and a function that reads one.

    Raises:
        ValueError: There are none, or an index is wrong.
    """
    for name, opened in ((WEIGHTS, _safetensors), (BIN, _pickled)):
        if (source / name).exists():
            return opened(source / name)
        if (index := source / (name + INDEX)).exists():
            return _sharded(index, opened)
    raise ValueError(f"it has neither {WEIGHTS} nor {WEIGHTS}{INDEX}, {BIN} or {BIN}{INDEX}")


def _sharded(index: Path, opened: Callable[[Path], Any]) -> tuple[Collection[str], Callable[[str], Tensor]]:
    places = _json(index)["weight_map"]
    shards: dict[str, Any] = {}
    for tensor, name in places.items():
        if name in (".", "..") or Path(name).name != name:
            raise ValueError(f"{index.name} has tensor {tensor} in {name!r}, which is no file of the folder")
        if name not in shards:
            shards[name] = opened(index.with_name(name))
        if tensor not in shards[name][0]:
            raise ValueError(f"{index.name} has tensor {tensor} in {name}, which does not have it")
    return places.keys(), lambda tensor: shards[places[tensor]][1](tensor)


def _safetensors(path: Path) -> tuple[Collection[str], Callable[[str], Tensor]]:
    with storage.plain(path).open("rb"):
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} is damaged, or no safetensors file ({error})") from error
    return file.keys(), file.get_tensor


def _pickled(path: Path) -> tuple[Collection[str], Callable[[str], Tensor]]:
    tensors = load_weights_only(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path.name} holds other things than tensors")
    return tensors.keys(), tensors.__getitem__


def _tokenizer(source: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder, None where it has none.

    Raises:
        ValueError: lm has no equal of it.
    """
    settings: Json = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists() and "added_tokens_decoder" not in settings:  # which replaced the second file
            settings |= _json(source / name)
    if (source / "tokenizer.json").exists():
        whole = _json(source / "tokenizer.json")
    elif (source / "vocab.json").exists() and (source / "merges.txt").exists():  # GPT-2's, of before tokenizer.json
        merges = storage.plain(source / "merges.txt").read_text().splitlines()
        whole = tokenizer_files.of_gpt2(_json(source / "vocab.json"), merges)
    else:
        return None
    try:
        tokenizer = tokenizer_files.from_files(whole, settings)
        file = _sized(source / TEMPLATE).read_text(encoding="utf-8") if (source / TEMPLATE).exists() else None
        tokenizer.chat = tokenizer_files.chat_of(settings, file)
        return tokenizer
    except ValueError as error:
        raise ValueError(f"its tokenizer cannot be held: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its tokenizer.json is none of Hugging Face's ({described(error)})") from error
