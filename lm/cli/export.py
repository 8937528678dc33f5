"""`lm export` and `lm import`: checkpoints in formats that other programs read, and back."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from lm.cli import common, values
from lm.inference import exporting


def export(arguments: list[str]) -> None:
    """Run `lm export`."""
    parser = ArgumentParser(
        prog="lm export",
        description="Write a checkpoint, a single file or sharded, in a format that other programs read.",
        exit_on_error=False,
    )
    parser.allow_abbrev = False
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument(
        "--format",
        type=Literal["safetensors", "file"],
        default="safetensors",
        help="safetensors: a folder of weights, tokenizer and configuration, without code or optimizer; file: one "
        "checkpoint file with everything, of a sharded one.",
    )
    parser.add_argument("--output", type=Path, required=True, help="The folder, or the file.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options = values.parse(parser, arguments)
    write = {"safetensors": exporting.export_safetensors, "file": exporting.export_file}[options.format]
    _say("exported", write(options.ckpt_path, options.output), options.json)


def import_(arguments: list[str]) -> None:
    """Run `lm import`."""
    parser = ArgumentParser(
        prog="lm import",
        description="Make a checkpoint of what lm export wrote: to sample from, to evaluate, and for --init_from.",
        exit_on_error=False,
    )
    parser.allow_abbrev = False
    parser.add_argument("--source", type=Path, required=True, help="The folder.")
    parser.add_argument("--output", type=Path, required=True, help="The checkpoint file.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options = values.parse(parser, arguments)
    _say("imported", exporting.import_safetensors(options.source, options.output), options.json)


def _say(what: str, path: Path, as_json: bool) -> None:
    if as_json:
        common.print_json({"path": str(path)})
    else:
        print(f"{what}: {path}")
