"""`lm prepare`: text to shards of tokens."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from lm.cli import common, plain_help, values
from lm.corpus import shards
from lm.corpus.formats import Settings
from lm.corpus.prepare import Preparation, prepare, summary
from lm.errors import Stopped, UserError, take_stops


def make_parser() -> ArgumentParser:
    """Return the parser of `lm prepare`."""
    parser = plain_help.make_parser(
        "prepare", "Turn text into a folder of token shards. Interrupted, the same command goes on."
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file of these options.")
    parser.add_argument("--source", nargs="+", type=str, help="Files, folders, globs, or - for standard input.")
    parser.add_argument("--output", type=Path | None, default=None, help="The folder of the prepared corpus.")
    parser.add_argument("--tokenizer", type=str | None, default=None, help=common.TOKENIZERS)
    parser.add_class_arguments(
        Preparation,
        None,
        as_group=False,
        skip={"source", "tokenizer", "output", "reading", "overwrite"},
        sub_configs=False,
    )
    parser.add_class_arguments(Settings, None, as_group=False)
    parser.add_argument("--overwrite", action="store_true", help="Replace another prepared corpus.")
    parser.add_argument(
        "--verify",
        nargs="?",
        type=str,
        default=None,
        const="",
        help="Check the checksums of --output, or of a folder.",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON; the rest goes to stderr.")
    return parser


def prepare_command(arguments: list[str]) -> None:
    """Run `lm prepare`."""
    parser = make_parser()
    options = values.parse(parser, arguments)
    began = time.monotonic()
    if options.verify is not None:
        folder = Path(options.verify or _needed("output", options.output))
        done, said = summary(shards.verify(folder).manifest), "whole"
    else:
        settings = Settings(**{name: options[name] for name in ("text_key", "errors", "format")})
        chosen = {
            name: options[name]
            for name in ("val_fraction", "test_fraction", "split", "dtype", "shard_tokens", "workers", "overwrite")
        }
        job = Preparation(
            source=_needed("source", options.source),
            tokenizer=_needed("tokenizer", options.tokenizer),
            output=_needed("output", options.output),
            reading=settings,
            **chosen,
        )
        folder = job.output
        take_stops(_stop)
        with common.text_options(job.source):
            done, said = prepare(job), "prepared"
    seconds = time.monotonic() - began
    out = common.output(options.json)
    print(
        f"{said}: {folder}: {done['tokens']:,} tokens of {_count(done['documents'], 'document')}, {done['bytes']:,} "
        f"bytes, in {_count(done['shards'], 'shard')}, {seconds:.1f} s",
        file=out,
    )
    if done["replaced"]:
        print(f"{done['replaced']:,} wrong bytes became U+FFFD", file=out)
    if done.get("skipped"):
        print(f"{done['skipped']:,} rows without text were left out", file=out)
    if not any(entry["tokens"] for entry in shards.read_manifest(folder)["splits"]["val"]):
        print("note: no text fell to validation, which lm fit needs: more text, or a larger --val_fraction", file=out)
    if options.json:
        common.print_json(done | {"seconds": round(seconds, 3)})


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _stop(signum: int, frame: FrameType | None) -> None:
    # once only: the shutdown, which ends the worker processes, must not be interrupted itself
    take_stops(signal.SIG_IGN)
    raise Stopped(signum)


def _needed(name: str, value: Any) -> Any:
    if not value:
        raise UserError(f"--{name} is missing: see lm prepare --help")
    return value
