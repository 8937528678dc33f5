"""`lm chat`: a conversation in the terminal, by the checkpoint's chat template."""

import asyncio
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from lm.checkpoints.restore import Fitted, load_network
from lm.cli import common, devices, plain_help, values
from lm.errors import UserError
from lm.generation.packed import packed
from lm.generation.sampling import Sampler, TextStream, generate


def make_parser() -> ArgumentParser:
    """Return the parser of `lm chat`."""
    parser = plain_help.make_parser("chat", "Talk with a network: a line is a turn; Ctrl-D ends, /new begins anew.")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="The checkpoint.")
    parser.add_argument("--system", type=str, default="", help="What the network is told first.")
    parser.add_argument("--chat_template", type=Path | None, default=None, help="In place of the checkpoint's own.")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="Longest answer, in tokens.")
    parser.add_class_arguments(Sampler, None, as_group=True)
    parser.add_argument("--seed", type=int, default=1337, help="Of the random choices.")
    devices.add_options(parser)
    return parser


def chat(arguments: list[str]) -> None:
    """Run `lm chat`."""
    options = values.parse(make_parser(), arguments)
    common.need_packages("chat", "jinja2")
    sampler = Sampler(**{name: options[name] for name in Sampler.__dataclass_fields__})
    fitted = load_network(options.ckpt_path, devices.device(options.device), writes=True)
    if options.chat_template is not None:
        template = common.chat_template(options.chat_template)
        fitted.tokenizer.chat = {**(fitted.tokenizer.chat or {}), "chat_template": template}
    if not fitted.tokenizer.chat:
        raise UserError(f"--ckpt_path {options.ckpt_path}: it has no chat template: say --chat_template, or lm sample")
    net, generator = packed(fitted.net, options.dtype), torch.Generator().manual_seed(options.seed)
    first = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(first)
    while (line := _line()) is not None:
        if line.strip() == "/new":
            messages = list(first)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            try:
                ids = _prompt(fitted, messages, len(first))
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {error.text}", file=sys.stderr, flush=True)  # a slip is no end of a conversation
                messages.pop()
                continue
            prompt = torch.tensor([ids], device=next(net.parameters()).device)
            answer = TextStream(fitted.tokenizer, [])
            tokens = generate(net, prompt, sampler=sampler, generator=generator)
            for _ in range(options.max_new_tokens):
                print(answer.add(int(next(tokens))), end="", flush=True)
                if answer.done:
                    break
            print(answer.finish(), flush=True)
            messages.append({"role": "assistant", "content": answer.text})


def _line() -> str | None:
    """Return the next line that is typed, None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _prompt(fitted: Fitted, messages: list[dict[str, str]], kept: int) -> list[int]:
    """Return a conversation's ids; where it is longer than the context, its first turns are forgotten.

    Raises:
        UserError: The template does not take it, or the last message alone is too long.
    """
    from lm.serving.errors import ApiError
    from lm.serving.templates import Templates, prompt_of

    chat, longest = fitted.tokenizer.chat or {}, int(fitted.net.block_size)  # type: ignore[arg-type]

    async def fitting() -> list[int]:
        templates = Templates()
        try:
            while len(found := await prompt_of(templates, fitted.tokenizer, chat, messages)) > longest:
                if len(messages) - kept < 3:
                    text = f"the message: with its template it has {len(found)} tokens, and the context {longest}"
                    raise UserError(text)
                del messages[kept : kept + 2]
            return found
        finally:
            await templates.close()

    try:
        return asyncio.run(fitting())
    except ApiError as error:
        raise UserError(error.message) from error
