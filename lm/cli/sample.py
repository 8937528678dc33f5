"""`lm sample`: print text that a checkpoint's network writes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from lm import storage
from lm.checkpoints.restore import Fitted, deny_what_runs_code, load_network
from lm.cli import common, devices, plain_help, values
from lm.errors import UserError
from lm.generation.packed import packed
from lm.generation.sampling import Sampler, TextStream, generate, start_tokens
from lm.generation.speculation import Draft, Repetition, SmallerNetwork, speculate
from lm.models import GPT
from lm.tokenizers import identity

if TYPE_CHECKING:
    from lm.data.tasks import TaskData

TEXT = ("lm.data.TextData", "lm.data.LinesData", "lm.data.ChatData")


def make_parser() -> ArgumentParser:
    """Return the parser of `lm sample`."""
    parser = plain_help.make_parser("sample", "Print text as it is made.")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument("--prompt", type=str, default="", help="Text to continue; it is printed too.")
    parser.add_argument("--prompt_file", type=Path | None, default=None, help="A UTF-8 file with the prompt.")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="Longest continuation, in tokens.")
    parser.add_class_arguments(Sampler, None, as_group=True)
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="End a text before this string; repeatable."
    )
    parser.add_argument("--num_samples", type=int, default=1, help="How many texts, made side by side.")
    parser.add_argument("--seed", type=int, default=1337, help="Of the random choices.")
    devices.add_options(parser)
    parser.add_argument(
        "--draft",
        type=str | None,
        default=None,
        metavar="CKPT",
        help="A smaller checkpoint of the same vocabulary, or the word repetition for the text's own: it guesses "
        "tokens, which are checked several at a time. Texts are as likely as without.",
    )
    parser.add_argument(
        "--compare",
        type=str | None,
        default=None,
        metavar="CORPUS",
        help="Say how many lines of the samples stand in this text: a path, or a name such as names.",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON; the text goes to stderr.")
    return parser


def sample(arguments: list[str]) -> None:
    """Run `lm sample`."""
    parser = make_parser()
    options = values.parse(parser, arguments)
    sampler = Sampler(**{name: options[name] for name in Sampler.__dataclass_fields__})
    if "" in options.stop:
        raise UserError("--stop '': an empty string would stop every text at once")
    prompt = _prompt(options.prompt, options.prompt_file)
    known = None if options.compare is None else _lines(options.compare)
    fitted = load_network(options.ckpt_path, devices.device(options.device), writes=True)
    task = _task(fitted.data)
    try:
        prompt, asked = task.question(prompt) if task and prompt else (prompt, prompt)  # a task has a form of its own
        ids = start_tokens(fitted.tokenizer, asked)
    except UserError as error:
        raise UserError(f"{'--prompt_file' if options.prompt_file else '--prompt'}: {error.text}") from error
    answer = task.readable if task and asked else str
    net = packed(fitted.net, options.dtype)
    device = next(net.parameters()).device
    began = time.monotonic()
    tokens = _tokens(options, sampler, fitted, net, torch.tensor([ids] * options.num_samples, device=device))
    separator = "" if _has_lines(fitted.data) else "---\n"  # a document is a line: one below the other
    streams = [TextStream(fitted.tokenizer, options.stop) for _ in range(options.num_samples)]
    out = common.output(options.json)
    print(prompt, end="", file=out, flush=True)
    made = 0
    for _ in range(options.max_new_tokens):
        for i, (stream, token) in enumerate(zip(streams, next(tokens).tolist(), strict=True)):
            if not stream.done:
                made += 1
                text = stream.add(token)
                if i == 0 and answer is str:  # the first is shown as it is generated, the others at the end
                    print(text, end="", file=out, flush=True)
        if all(stream.done for stream in streams):
            break
    seconds = time.monotonic() - began
    rest = streams[0].finish()
    print(rest if answer is str else answer(streams[0].text), file=out, flush=True)
    for stream in streams[1:]:
        stream.finish()
        print(f"{separator}{prompt}{answer(stream.text)}", file=out, flush=True)
    texts = [prompt + answer(stream.text) for stream in streams]
    novelty = {} if known is None else _compared(texts, known)
    if known is not None:
        share = f" ({novelty['known_share']:.0%})" if novelty["lines"] else ""
        print(f"{novelty['known']} of {novelty['lines']} lines stand in {options.compare}{share}", file=out)
    if options.json:
        speed = {"tokens": made, "seconds": round(seconds, 3), "tokens_per_second": round(made / seconds, 1)}
        common.print_json({"text": texts, **speed, **novelty})


def _tokens(
    options: Any, sampler: Sampler, fitted: Fitted, net: nn.Module, prompt: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Return the next token of every sample (B,), again and again, for prompts (B, T).

    Raises:
        UserError: Nothing can be guessed by --draft.
    """
    draws: dict[str, Any] = {"sampler": sampler, "generator": torch.Generator().manual_seed(options.seed)}
    if options.draft is None:
        return generate(net, prompt, **draws)
    if options.num_samples > 1:
        raise UserError(f"--draft with --num_samples {options.num_samples}: it guesses for one text alone: drop one")
    if options.draft == "repetition":
        guesser: Draft = Repetition(fitted.net.vocab_size)  # type: ignore[arg-type]
        networks = [net]
    else:
        smaller = load_network(Path(options.draft), prompt.device, writes=True)
        if identity(smaller.tokenizer.state()) != identity(fitted.tokenizer.state()):
            raise UserError(f"--draft {options.draft} has another vocabulary: name a checkpoint of the same tokenizer")
        networks = [net, packed(smaller.net, options.dtype)]
        guesser = SmallerNetwork(networks[1], sampler, torch.Generator().manual_seed(options.seed))  # type: ignore[arg-type]
    if not all(isinstance(one, GPT) for one in networks):
        raise UserError("--draft is for GPTs: their caches can forget a wrong guess")
    return (torch.tensor([token]) for token in speculate(net, prompt, guesser, **draws))  # type: ignore[arg-type]


def _has_lines(data: Any) -> bool:
    return isinstance(data, dict) and data.get("class_path") == "lm.data.LinesData"


def _lines(corpus: str) -> set[str]:
    """Return the lines of a corpus.

    Raises:
        UserError: It is not to be had.
    """
    from lm.corpus import sources

    try:
        return {line.strip() for line in sources.find(corpus).read().splitlines()}
    except UserError as error:
        raise UserError(f"--compare {corpus}: {error.text}") from error


def _compared(texts: list[str], known: set[str]) -> dict[str, Any]:
    """Return how many of some texts' lines are known; lines without a word do not count."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    there = sum(line in known for line in lines)
    return {"lines": len(lines), "known": there, "known_share": round(there / len(lines), 4) if lines else None}


def _task(data: Any) -> "TaskData | None":
    """Return the task that a network was trained on; None where that was text, or is not known."""
    if not isinstance(data, dict) or data.get("class_path") in (None, *TEXT):
        return None
    from lm.data.tasks import task_of  # imports Lightning, which takes a second

    deny_what_runs_code()
    return task_of(data)


def _prompt(prompt: str, file: Path | None) -> str:
    """Return the prompt, given directly or in the file.

    Raises:
        UserError: Both were given, or the file cannot be read as UTF-8.
    """
    if file is None:
        return prompt
    if prompt:
        raise UserError("--prompt and --prompt_file: say one of them")
    try:
        opened = str(file) == "/dev/stdin" or str(file).startswith("/dev/fd/")  # by the shell: opening it cannot block
        return (file if opened else storage.plain(file)).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt_file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {file}: not UTF-8 at byte offset {error.start}") from error
