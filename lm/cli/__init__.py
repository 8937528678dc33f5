"""The one front door: `lm COMMAND`. Nothing heavy is imported until a command is chosen."""

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from lm import __version__
from lm.errors import CommandError, Stopped, UserError

COMMANDS = {
    "fit": ("lm.cli.fit:fit", "train a network; writes checkpoints/RUN and logs/RUN"),
    "validate": ("lm.cli.evaluate:validate", "evaluate a checkpoint on the whole of a split"),
    "test": ("lm.cli.evaluate:test", "evaluate a checkpoint on the test split"),
    "gradients": ("lm.cli.gradients:gradients", "compare gradients by hand with autograd's"),
    "plan": ("lm.cli.plan:plan", "say what a recipe needs of a cluster: memory, hours, strategy"),
    "prepare": ("lm.cli.prepare:prepare_command", "turn text into a folder of token shards"),
    "tokenizer": ("lm.cli.tokenizer:tokenizer", "train a byte-pair encoding on text"),
    "sample": ("lm.cli.sample:sample", "print text that a checkpoint's network writes"),
}


def usage() -> str:
    """Return what `lm --help` prints."""
    lines = [f"  {name:<10} {help_}" for name, (_, help_) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lm COMMAND [options]",
            "",
            "Train every language model on the road from a bigram table to GPT-2.",
            "",
            *lines,
            "",
            "lm COMMAND --help tells a command's options; lm --version the version.",
            "First run: lm fit --config configs/quickstart.yaml",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows `lm`; the process's own by default.

    Returns:
        The exit code: 0 done, 1 a check failed, 2 bad input, 128 + n stopped by signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["-h"], ["--help"]):
        print(usage())
        return 0
    if words == ["--version"]:
        print(f"lm {__version__}")
        return 0
    try:
        return _run(words)
    except CommandError as error:
        if os.environ.get("LM_DEBUG") and not isinstance(error, Stopped):
            raise
        line = " ".join(str(error).split())
        print(line if isinstance(error, Stopped) else f"error: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone; say no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _stop(signum: int, frame: FrameType | None) -> None:
    # an exception here would come up inside whatever is being imported, and be taken for that code's own
    os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)


def _run(words: list[str]) -> int:
    if not words:
        print(usage(), file=sys.stderr)
        raise UserError("no command: say one of " + ", ".join(COMMANDS))
    name, *rest = words
    if name not in COMMANDS:
        print(usage(), file=sys.stderr)
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"unknown command {name}: {f'did you mean {near[0]}?' if near else 'see above'}")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _stop)
    module, function = COMMANDS[name][0].split(":")
    getattr(importlib.import_module(module), function)(rest)
    return 0
