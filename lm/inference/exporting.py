"""Checkpoints in formats that other programs read, and back.

A folder of format safetensors has the weights in model.safetensors, under their names in the network, and in lm.json
all else that a network is used with: its configuration, its tokenizer, its sizes and the step. Neither can hold code.
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lm.data import files
from lm.errors import UserError
from lm.inference.loading import build
from lm.training import checkpoint

WEIGHTS, REST = "model.safetensors", "lm.json"
PREFIX = "net."


def export_safetensors(ckpt_path: Path, folder: Path) -> Path:
    """Write a checkpoint's network, a single file or sharded, as a folder that has no optimizer's state.

    Raises:
        UserError: The checkpoint is damaged, or the folder cannot be written to.
    """
    saved = checkpoint.load(ckpt_path)
    weights = {k.removeprefix(PREFIX): v for k, v in saved["state_dict"].items() if k.startswith(PREFIX)}
    alone, same = _without_doubles(weights)
    rest = saved["lm"] | {"step": saved["global_step"], "same": same}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(folder / WEIGHTS, save(alone, metadata={"format": "pt"}))
        files.write_whole(folder / REST, json.dumps(rest, ensure_ascii=False).encode())
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror or error}: say a folder that can be written to") from error
    return folder


def _without_doubles(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights that share no memory, as the format wants them, and for each that is left out the one it is."""
    alone: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in weights.items():
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        if place in first:
            same[name] = first[place]
        else:
            first[place] = name
            alone[name] = value.contiguous()
    return alone, same


def import_safetensors(folder: Path, output: Path) -> Path:
    """Write a checkpoint, a single file, from such a folder: for use and for --init_from, not to go on with.

    Raises:
        UserError: The folder is none, or its weights are not those of the network that it names.
    """
    try:
        rest = json.loads((folder / REST).read_text())
        weights = load_file(folder / WEIGHTS)
        weights |= {name: weights[other] for name, other in rest.pop("same").items()}
        step = int(rest.pop("step"))
        net = build(rest["config"]["model"]["init_args"]["net"], rest["vocab_size"], rest["block_size"])
        net.load_state_dict(weights)
    except OSError as error:
        raise UserError(
            f"--source {folder}: {error}: it should have {WEIGHTS} and {REST}, as lm export writes"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(f"--source {folder}: it is not what lm export writes ({what}): export it again") from error
    saved = {
        "pytorch-lightning_version": metadata.version("lightning"),  # without it Lightning takes it for an old one
        "lm": rest,
        "global_step": step,
        "epoch": 0,
        "state_dict": {PREFIX + name: value for name, value in weights.items()},
        "optimizer_states": [],
        "start": 0,
    }
    checkpoint.write(saved, output)
    return output


def export_file(ckpt_path: Path, output: Path) -> Path:
    """Write a checkpoint as one file that has everything, whatever kind it is.

    Raises:
        UserError: It is damaged, or the file cannot be written.
    """
    checkpoint.write(checkpoint.load(ckpt_path), output)
    return output
