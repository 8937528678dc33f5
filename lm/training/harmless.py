"""Catches errors of figures, samples and loggers: what only displays a training run must never stop it."""

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.loggers import Logger
from tqdm import tqdm

from lm import log
from lm.errors import Stopped, causes, described

WRITES = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")


def harmless(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method that only displays a training run: its errors are printed once per kind, and training goes on.

    A second stop signal, which may come at any moment, is let through.
    """

    @wraps(hook)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Stopped:
            raise
        except Exception as error:
            _say_once(self, error)
            return None

    return guarded


def guard(logger: Logger) -> None:
    """Make a logger's methods harmless, whoever calls them: this program, Lightning or a callback."""
    for name in WRITES:
        setattr(logger, name, harmless(getattr(type(logger), name)).__get__(logger))


def _say_once(owner: Any, error: Exception) -> None:
    """Print a line about an error, unless the same object has had one of its kind."""
    # a full disk comes out of TensorBoardLogger as a ValueError
    error = next((cause for cause in causes(error) if isinstance(cause, OSError)), error)
    what = f"{type(owner).__name__} failed ({described(error, 300)})"
    text = f"note: {what}: training goes on; more errors of this kind are not shown"
    if note_once(owner, text, kind=(type(error), getattr(error, "errno", None))) and os.environ.get("LM_DEBUG"):
        traceback.print_exception(error)


def note_once(owner: Any, text: str, kind: Any = None) -> bool:
    """Print a note about an object, once per kind; return whether it was printed.

    Args:
        owner: The object; it remembers which kinds were printed.
        text: The line.
        kind: What makes two notes of one kind; the text by default.
    """
    said = vars(owner).setdefault("_said", set())
    if (kind or text) in said:
        return False
    said.add(kind or text)
    tqdm.write(log.line(text, level="warning"), file=sys.stderr)  # above a progress bar, where there is one
    return True
