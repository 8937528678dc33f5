"""Where errors of figures, samples and loggers end: what only shows a training must never stop it."""

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
    """Decorate a method of what shows a training: its errors are printed, once for each kind, and training goes on.

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
    said = vars(owner).setdefault("_errors_said", set())
    kind = (type(error), getattr(error, "errno", None))
    if kind in said:
        return
    said.add(kind)
    if os.environ.get("LM_DEBUG"):
        traceback.print_exception(error)
    what = f"{type(owner).__name__} failed ({described(error, 300)})"
    line = log.line(f"note: {what}: training goes on; more errors of this kind are not shown", level="warning")
    tqdm.write(line, file=sys.stderr)  # above a progress bar, where there is one
