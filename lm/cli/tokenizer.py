"""`lm tokenizer`: train a byte-level byte-pair encoding."""

import time
from pathlib import Path

from jsonargparse import ArgumentParser

from lm.cli import common, plain_help, values
from lm.corpus.formats import Settings
from lm.corpus.tokenizer_training import train


def make_parser() -> ArgumentParser:
    """Return the parser of `lm tokenizer`."""
    parser = plain_help.make_parser(
        "tokenizer", "Train a byte-level byte-pair encoding on text; --tokenizer takes the file it writes."
    )
    parser.add_argument("--source", nargs="+", type=str, required=True, help="Files, folders or globs.")
    parser.add_argument(
        "--vocab_size", type=int, required=True, help="Tokens, the 256 bytes among them; the end of text comes on top."
    )
    parser.add_argument("--output", type=Path, required=True, help="The .tiktoken file: a new one.")
    parser.add_argument("--overwrite", action="store_true", help="Replace another .tiktoken file.")
    parser.add_class_arguments(Settings, None, as_group=False)
    parser.add_argument("--json", action="store_true", help="Print the result as JSON; the rest goes to stderr.")
    return parser


def tokenizer(arguments: list[str]) -> None:
    """Run `lm tokenizer`."""
    parser = make_parser()
    options = values.parse(parser, arguments)
    began = time.monotonic()
    settings = Settings(**{name: options[name] for name in ("text_key", "errors", "format")})
    with common.text_options(options.source):
        made = train(options.source, options.vocab_size, options.output, settings, overwrite=options.overwrite)
    seconds = time.monotonic() - began
    print(
        f"trained: {options.output}: {made['vocab_size']:,.0f} tokens, {made['bytes_per_token']} bytes per token, "
        f"{seconds:.1f} s",
        file=common.output(options.json),
    )
    if options.json:
        common.print_json(made)
