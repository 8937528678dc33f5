"""`lm export` and `lm import`: checkpoints in formats that other programs read, and back."""

import sys
from pathlib import Path
from typing import Literal

from lm import log
from lm.checkpoints import safetensors
from lm.cli import common, plain_help, values


def export(arguments: list[str]) -> None:
    """Run `lm export`."""
    parser = plain_help.make_parser(
        "export", "Write a checkpoint, a single file or sharded, in a format that other programs read."
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument(
        "--format",
        type=Literal["safetensors", "file"],
        default="safetensors",
        help="safetensors: a folder of weights, tokenizer and configuration, without code or optimizer; file: one "
        "checkpoint file with everything, of a sharded one.",
    )
    parser.add_argument("--output", type=Path, required=True, help="The folder, or the file: a new one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what lm has exported there before.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options = values.parse(parser, arguments)
    write = {"safetensors": safetensors.export_safetensors, "file": safetensors.export_file}[options.format]
    path = write(options.ckpt_path, options.output, overwrite=options.overwrite, note=_note)
    _say("exported", path, options.json)


def import_(arguments: list[str]) -> None:
    """Run `lm import`."""
    parser = plain_help.make_parser(
        "import", "Make a checkpoint of what lm export wrote: to sample from, to evaluate, and for --init_from."
    )
    parser.add_argument("--source", type=Path, required=True, help="The folder.")
    parser.add_argument("--output", type=Path, required=True, help="The checkpoint file: a new one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a checkpoint of lm's.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options = values.parse(parser, arguments)
    path = safetensors.import_safetensors(options.source, options.output, overwrite=options.overwrite, note=_note)
    _say("imported", path, options.json)


def _note(text: str) -> None:
    print(log.line(f"note: {text}", level="warning"), file=sys.stderr)


def _say(what: str, path: Path, as_json: bool) -> None:
    if as_json:
        common.print_json({"path": str(path)})
    else:
        print(f"{what}: {path}")
