"""The entry point: `lm COMMAND`. Nothing heavy is imported until a command is chosen."""

import difflib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from lm import __version__, log
from lm.cli import environment, help, streams
from lm.errors import CommandError, Stopped, UserError, as_user_error, take_stops

COMMANDS = {
    "fit": ("lm.cli.fit:fit", "train a network; writes checkpoints/RUN and logs/RUN"),
    "validate": ("lm.cli.evaluate:validate", "evaluate a checkpoint on the whole of a split"),
    "test": ("lm.cli.evaluate:test", "evaluate a checkpoint on the test split"),
    "gradients": ("lm.cli.gradients:gradients", "compare gradients by hand with autograd's"),
    "inspect": ("lm.cli.inspect:inspect", "show a recipe's layers, a batch of its data, a text in tokens"),
    "exercises": ("lm.cli.exercises:exercises", "write workbooks of gradients to derive, and check them"),
    "plan": ("lm.cli.plan:plan", "say what a recipe needs of a cluster: memory, hours, strategy"),
    "bench": ("lm.cli.bench:bench", "time a recipe's training steps, or the text it writes, on this machine"),
    "prepare": ("lm.cli.prepare:prepare_command", "turn text into a folder of token shards"),
    "tokenizer": ("lm.cli.tokenizer:tokenizer", "train a byte-pair encoding on text"),
    "sample": ("lm.cli.sample:sample", "print text that a checkpoint's network writes"),
    "solve": ("lm.cli.solve:solve", "answer a problem by a network that was trained on such: 12*34"),
    "classify": ("lm.cli.classify:classify", "say the class of a text, and how likely it is"),
    "chat": ("lm.cli.chat:chat", "talk with a network in the terminal"),
    "serve": ("lm.cli.serve:serve", "serve checkpoints by OpenAI's protocol, with a page"),
    "export": ("lm.cli.export:export", "write a checkpoint in a format that other programs read"),
    "import": ("lm.cli.export:import_", "make a checkpoint of what was exported"),
    "sweep": ("lm.cli.sweep:sweep", "search the settings of a recipe for those that train best"),
    "report": ("lm.cli.report:report", "write one page of curves, settings and samples about runs"),
    "doctor": ("lm.cli.doctor:doctor", "say what of this machine matters to training, and what to change"),
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
            "lm COMMAND --help tells a command's options, --help.all every one; lm --version the version.",
            "First run: lm fit --config configs/quickstart.yaml",
        ]
    )


@log.naming_options()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows `lm`; the process's own by default.

    Returns:
        The exit code: 0 done, 1 a check failed, 2 bad input, 128 + n stopped by signal n.
    """
    if arguments is None:  # a process of its own
        streams.prepare()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except CommandError as error:
        return _end(error)
    except BrokenPipeError:  # the reader of our output has gone; say no more
        streams.drop(1)
        return 128 + signal.SIGPIPE
    except (OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("LM_DEBUG") or (found := as_user_error(error)) is None:
            raise
        return _end(_naming_the_option(found, error, words))
    finally:
        if arguments is None:
            gc.freeze()  # the interpreter's own search for garbage, as it ends, takes a second


def _naming_the_option(found: UserError, error: Exception, words: list[str]) -> UserError:
    """Return an error about a file, prefixed with the option that named the file or its folder."""
    from lm.cli import messages

    file = getattr(error, "filename", None)
    for one in messages.said(words):
        if isinstance(file, str) and one.value and one.key != "config" and file.startswith(one.value):
            return UserError(f"{one.place or '--'}{one.key} {found}")
    return found


def _end(error: CommandError) -> int:
    """Say why a command ends, and return its exit code."""
    if os.environ.get("LM_DEBUG") and not isinstance(error, Stopped):
        raise error
    level = "warning" if isinstance(error, Stopped) else "error"
    if error.text and log.first_to_say(error.text):
        line = log.line(error.text, level=level, run=error.run, exit_code=error.exit_code)
        with suppress(OSError):  # nobody can be told
            print(line, file=sys.stderr, flush=True)
    write_exit_code(error.exit_code)
    return error.exit_code


def write_exit_code(code: int) -> None:
    """Write the exit code to the empty file that LM_EXIT_CODE names: torchrun itself always exits with 1.

    Only the first process of a job to fail writes its code; the others end because it did.
    """
    path = os.environ.get("LM_EXIT_CODE")
    if path and os.path.exists(path) and not os.path.getsize(path):
        with open(path, "w") as file:
            file.write(str(code))


def _stop(signum: int, frame: FrameType | None) -> None:
    # an exception here would be raised inside whatever is being imported, and look like that code's error
    stop = Stopped(signum)
    with suppress(OSError):  # nobody reads it any more
        os.write(2, f"{log.line(str(stop), level='warning')}\n".encode())
    write_exit_code(stop.exit_code)
    os._exit(stop.exit_code)


def _run(words: list[str]) -> int:
    if words in (["-h"], ["--help"]):
        print(usage())
        return 0
    if words == ["--version"]:
        print(f"lm {__version__}")
        return 0
    if not words:
        print(usage(), file=sys.stderr)
        raise UserError("no command: say one of " + ", ".join(COMMANDS))
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"say one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name[:40]}: {hint}")
    take_stops(_stop)
    if name in help.PAGES and {"-h", "--help"} & set(rest):
        print(help.page(name))
        return 0
    if name not in help.PAGES:  # all of their help fits on a screen
        rest = ["--help" if word == "--help.all" else word for word in rest]
    environment.numbers()
    module, function = COMMANDS[name][0].split(":")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each of its warnings brings fifty lines of stack
    new = module not in sys.modules
    gc.disable()  # imported objects stay; searching them for garbage takes half a second
    command = getattr(importlib.import_module(module), function)
    if new:
        gc.freeze()  # nor are they searched later
    gc.enable()
    command(rest)
    return 0
