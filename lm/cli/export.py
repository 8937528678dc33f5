"""`lm export` and `lm import`: checkpoints in formats that other programs read, and back."""

import sys
from pathlib import Path
from typing import Literal

from lm import log
from lm.checkpoints import gguf, huggingface, imports, safetensors
from lm.cli import common, plain_help, values

EXPORTS = {
    "safetensors": safetensors.export_safetensors,
    "hf": huggingface.export_huggingface,
    "gguf": gguf.export_gguf,
    "file": safetensors.export_file,
}


def export(arguments: list[str]) -> None:
    """Run `lm export`."""
    parser = plain_help.make_parser(
        "export", "Write a checkpoint, a single file or sharded, in a format that other programs read."
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument(
        "--format",
        type=Literal["safetensors", "hf", "gguf", "file"],
        default="safetensors",
        help="safetensors: a folder of weights, tokenizer and configuration, without code or optimizer; hf: a folder "
        "that Hugging Face's transformers loads as GPT-2 or LLaMA; gguf: a file for llama.cpp; file: one checkpoint "
        "file with everything, of a sharded one.",
    )
    parser.add_argument("--output", type=Path, required=True, help="The folder, or the file: a new one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what lm has exported there before.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options = values.parse(parser, arguments)
    path = EXPORTS[options.format](options.ckpt_path, options.output, overwrite=options.overwrite, note=_note)
    _say("exported", path, options.json)


def import_(arguments: list[str]) -> None:
    """Run `lm import`."""
    parser = plain_help.make_parser(
        "import",
        "Make a checkpoint of what lm export wrote, of a GPT-2 or LLaMA as Hugging Face's transformers has them, of a "
        "GGUF file, or of nanoGPT's ckpt.pt: to sample from, to evaluate, and for --init_from.",
    )
    parser.add_argument("--source", type=Path, required=True, help="The folder or file.")
    parser.add_argument("--output", type=Path, required=True, help="The checkpoint file: a new one.")
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="If the source has none: char, byte, gpt2, a .tiktoken file."
    )
    parser.add_argument(
        "--corpus", type=str | None, default=None, help="The text that char's symbols are from [shakespeare]."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a checkpoint of lm's.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    options = values.parse(parser, arguments)
    names = {name: options[name] for name in ("tokenizer", "corpus", "overwrite")}
    path = imports.import_any(options.source, options.output, note=_note, **names)
    _say("imported", path, options.json)


def _note(text: str) -> None:
    print(log.line(f"note: {text}", level="warning"), file=sys.stderr)


def _say(what: str, path: Path, as_json: bool) -> None:
    if as_json:
        common.print_json({"path": str(path)})
    else:
        print(f"{what}: {path}")
