"""Conversion of checkpoints to formats that other programs read, and back.

A safetensors folder has the weights in model.safetensors, under their names in the network, and in lm.json all else
that using the network takes: its configuration, its tokenizer, its sizes and the step. Neither can hold code.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lm import outputs, storage
from lm.checkpoints import checkpoint, owned, schema
from lm.checkpoints.restore import build
from lm.checkpoints.schema import Saved
from lm.errors import UserError, setting
from lm.tokenizers import from_state

WEIGHTS, REST = "model.safetensors", "lm.json"
NAMES = rf"{WEIGHTS}|{REST}"


def export_safetensors(
    ckpt_path: Path, output: Path, *, overwrite: bool = False, note: Callable[[str], None] = print
) -> Path:
    """Write the network of a checkpoint, single-file or sharded, as a folder without optimizer state.

    Args:
        ckpt_path: The checkpoint.
        output: A new folder.
        overwrite: Whether it may replace an earlier export.
        note: Called with a line about weights that are not finite: they are exported as they are.

    Raises:
        UserError: The checkpoint is damaged, or the folder is not free or cannot be written to.
    """
    check_folder(output, NAMES, _is_export, overwrite=overwrite)
    loaded = checkpoint.load(ckpt_path)
    with checkpoint.of_lm(ckpt_path):
        saved = Saved.of(loaded)
        refuse_scores(saved, ckpt_path)
        weights = saved.weights
        alone, same = _without_doubles(weights)
        rest = saved.entry() | {"step": saved.step, "same": same}
        data = {WEIGHTS: save(alone, metadata={"format": "pt"}), REST: json.dumps(rest, ensure_ascii=False).encode()}
    note_not_finite(ckpt_path, weights, note)
    write_folder(output, NAMES, data)
    return output


def refuse_scores(saved: Saved, ckpt_path: Path) -> None:
    """Raise UserError for a reward model: what reads the formats of networks that write would take it for one."""
    if saved.scores:
        what = "a reward model is no network that writes"
        raise UserError(f"checkpoint {ckpt_path}: {what}: say {setting('format')} file")


def check_folder(output: Path, names: str, ours: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Check that an export may be written to a folder; see `outputs.check_free`.

    Args:
        output: The folder.
        names: A regular expression, the names of an export's files.
        ours: Returns whether a folder is such an export.
        overwrite: Whether that may be replaced.

    Raises:
        UserError: It is not free.
    """
    outputs.check_place(output, made="folder of an export")
    _put_back(output, names)
    outputs.check_free(output, made="folder of an export", ours=ours, overwrite=overwrite)


def write_folder(output: Path, names: str, data: dict[str, bytes]) -> None:
    """Write a folder, whole or not at all, in place of an earlier export, if any.

    Args:
        output: The folder, checked by `check_folder`.
        names: A regular expression, the names of an export's files.
        data: The contents of its files, by name.

    Raises:
        UserError: It cannot be written to.
    """
    part = storage.part_of(output)
    try:
        with storage.folder_made(output.parent):
            part.mkdir()
            for name, content in data.items():
                storage.write_whole(part / name, content)
            storage.replace_folder(part, output, names)
    except OSError as error:
        with suppress(OSError, UserError):
            storage.remove_folder(part, rf"\.?({names}).*")
        raise UserError(
            f"{setting('output')} {output}: {error.strerror or error}: say a folder that can be written to"
        ) from error


def _put_back(folder: Path, names: str) -> None:
    with suppress(OSError):  # the folder is read-only: what comes next says so
        storage.put_back(folder, names)


def _is_export(path: Path) -> bool:
    """Return whether a folder is what `export_safetensors` wrote, and has nothing else."""
    if not storage.holds_only(path, NAMES):
        return False
    with suppress(OSError, ValueError, TypeError, KeyError):
        return "class_path" in schema.net_of(json.loads(storage.plain(path / REST).read_text())["config"])
    return False


def note_not_finite(path: Path, weights: dict[str, Tensor], note: Callable[[str], None]) -> None:
    """Say which weight is not finite, if one is."""
    if name := schema.not_finite(weights):
        note(f"{path}: {name} is not finite: it is written as it is, the network is of no use")


def _without_doubles(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights without tied duplicates, as the format requires, and each duplicate's original by name."""
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


def import_safetensors(
    source: Path, output: Path, *, overwrite: bool = False, note: Callable[[str], None] = print
) -> Path:
    """Write a single-file checkpoint from such a folder: for inference and fine-tuning, not for resuming.

    Args:
        source: What `export_safetensors` wrote.
        output: A new file.
        overwrite: Whether it may replace a checkpoint of lm's.
        note: Called with a line about weights that are not finite.

    Raises:
        UserError: The folder is not an export, its weights are not those of the network that it names, or the output is
            not free or cannot be written.
    """
    outputs.check_free(output, made="checkpoint", ours=owned.is_ours, overwrite=overwrite)
    _put_back(source, NAMES)
    try:
        rest = json.loads(storage.plain(source / REST).read_text())
        weights = load_file(storage.plain(source / WEIGHTS))
        weights |= {name: weights[other] for name, other in rest.pop("same").items()}
        step = int(rest.pop("step"))
        state = {schema.NET + name: value for name, value in weights.items()}
        saved = Saved.of({schema.OURS: rest, "global_step": step, "state_dict": state})
        net = build(saved.net, saved.vocab_size, saved.block_size)
        net.load_state_dict(weights)
        from_state(saved.tokenizer)
    except OSError as error:
        if not source.exists():
            raise UserError(f"{setting('source')} {source}: there is no such file or folder") from error
        raise UserError(
            f"{setting('source')} {source}: {error}: it should have {WEIGHTS} and {REST}, as lm export writes"
        ) from error
    except (*checkpoint.FOREIGN, SafetensorError) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(
            f"{setting('source')} {source}: it is not what lm export writes ({what}): export it again"
        ) from error
    note_not_finite(source, weights, note)
    write_file(saved.imported(), output)
    return output


def export_file(ckpt_path: Path, output: Path, *, overwrite: bool = False, note: Callable[[str], None] = print) -> Path:
    """Write a checkpoint, single-file or sharded, as one file that has everything.

    Args:
        ckpt_path: The checkpoint.
        output: A new file.
        overwrite: Whether it may replace a checkpoint of lm's.
        note: Called with a line about weights that are not finite.

    Raises:
        UserError: It is damaged, or the file is not free or cannot be written.
    """
    outputs.check_free(output, made="checkpoint", ours=owned.is_ours, overwrite=overwrite)
    saved = checkpoint.load(ckpt_path)
    with checkpoint.of_lm(ckpt_path):
        note_not_finite(ckpt_path, Saved.of(saved).state, note)
    write_file(saved, output)
    return output


def write_file(saved: dict[str, Any], output: Path) -> None:
    """Write a checkpoint file; raises UserError where it cannot be written."""
    try:
        with storage.folder_made(output.parent):
            checkpoint.write(saved, output)
    except OSError as error:
        raise UserError(f"{setting('output')} {output}: {error.strerror or error}: say another place") from error
