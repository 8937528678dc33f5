"""A run's folder of checkpoints: which of them training starts from, and what a killed process has left there."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from lm import storage
from lm.checkpoints import owned, sharded
from lm.checkpoints.checkpoint import copy, damage, verify
from lm.errors import UserError, setting


def clear(folder: Path) -> None:
    """Remove what a process killed while writing has left. No other process may be using the folder."""
    probes = [path for path in folder.glob(".probe.*") if re.fullmatch(r"\.probe\.[0-9a-f]+", path.name)]
    for part in (*storage.parts(folder, r".*\.ckpt"), *probes):
        if not owned.is_foreign(part):
            part.unlink()
    for part in (*sharded.unfinished(folder), *folder.glob(".*.ckpt.copy.part")):
        owned.remove(part)


def renew_last(folder: Path, newest: Path | None) -> None:
    """Make last.ckpt the newest whole checkpoint again, where it was damaged, or not yet written when a run ended."""
    last = folder / "last.ckpt"
    if newest not in (None, last):
        copy(newest, last)


def resolve(
    folder: Path, candidates: Iterable[Path], ckpt_path: str | None, note: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint that training starts from; None is a fresh start.

    Args:
        folder: The run's checkpoints.
        candidates: The readable ones, the newest first.
        ckpt_path: None, `last`, `auto` or a path.
        note: Called with a line about each damaged checkpoint that is skipped.

    Raises:
        UserError: The run has checkpoints and nothing was requested, or the requested one is missing or damaged.
    """
    found = sorted(folder.glob("*.ckpt"))
    if ckpt_path not in (None, "last", "auto"):
        return verify(Path(ckpt_path).expanduser())
    if not found:
        if ckpt_path == "last":
            raise UserError(
                f"{setting('ckpt_path')} last: {folder} has no checkpoint: leave it out to start, or say auto"
            )
        return None
    if ckpt_path is None:
        raise UserError(
            f"{folder} has checkpoints already: say {setting('ckpt_path')} last to continue the run, or "
            f"{setting('name')} for a new one"
        )
    last = folder / "last.ckpt"
    if last in found and last not in candidates:
        note(f"{last} is damaged: {damage(last)}")
    for path in candidates:
        problem = damage(path)
        if problem is None:
            if path != last:
                note(f"continuing from {path}, the newest whole checkpoint")
            return path
        note(f"{path} is damaged: {problem}")
    raise UserError(
        f"{setting('ckpt_path')} {ckpt_path}: none of the {len(found)} checkpoints in {folder} is whole; move them away"
    )
