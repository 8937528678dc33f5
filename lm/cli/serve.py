"""`lm serve`: an OpenAI-compatible server, and a page."""

import re
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lm import log
from lm.checkpoints.restore import load_network
from lm.cli import common, devices, plain_help, values
from lm.errors import UserError, as_user_error
from lm.generation.packed import packed


def make_parser() -> ArgumentParser:
    """Return the parser of `lm serve`."""
    parser = plain_help.make_parser("serve", "Serve checkpoints by OpenAI's protocol, with a page at /.")
    add = parser.add_argument
    add(
        "--ckpt_path",
        type=str,
        nargs="+",
        required=True,
        metavar="CKPT",
        help="Checkpoints; a name and = before one is what clients call it, by default its run's.",
    )
    add("--host", type=str, default="127.0.0.1", help="The address to listen at; this machine alone.")
    add("--port", type=int, default=8000, help="0 for a free one.")
    add("--api_key_file", type=Path | None, default=None, help="Keys, one a line; or one in LM_API_KEY.")
    add("--allow_anyone", action="store_true", help="Listen at an address that others reach, without a key.")
    add(
        "--cors_origin",
        type=str,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="A site whose pages may call this server, https://example.org; repeatable.",
    )
    add("--chat_template", type=Path | None, default=None, help="A template in place of the checkpoints' own.")
    add("--slots", type=int, default=16, help="Texts in work at once; others wait.")
    add("--max_requests", type=int, default=256, help="Requests in work and waiting; more are refused by 429.")
    add("--max_tokens", type=int, default=4096, help="Longest answer.")
    add("--max_prompt_tokens", type=int | None, default=None, help="Longest prompt; at most the network's context.")
    add("--max_choices", type=int, default=16, help="Texts that a request makes: prompts times n or best_of.")
    add("--max_body_bytes", type=int, default=1 << 20, help="Largest request.")
    add("--timeout", type=float, default=600.0, help="Seconds for a request.")
    add("--body_timeout", type=float, default=30.0, help="Seconds in which a request must arrive.")
    add("--grace", type=float, default=30.0, help="Seconds for what runs when the server is stopped.")
    devices.add_options(parser)
    return parser


def serve(arguments: list[str]) -> None:
    """Run `lm serve`."""
    options = values.parse(make_parser(), joined(arguments))
    common.need_packages("serve", "starlette", "uvicorn", "jinja2")
    from lm.serving import guard, server
    from lm.serving.app import make_app
    from lm.serving.calls import Limits
    from lm.serving.metrics import Metrics
    from lm.serving.service import Service

    keys, loopback = guard.read_keys(options.api_key_file), guard.is_loopback(options.host)
    if not (loopback or keys or options.allow_anyone):
        raise UserError(
            f"--host {options.host[:100]} is reached by others, and there is no key: say --api_key_file, or "
            "--allow_anyone"
        )
    origins = [_origin(one) for one in options.cors_origin]
    named = names(options.ckpt_path)
    template = None if options.chat_template is None else common.chat_template(options.chat_template)
    socket = server.bind(options.host, options.port)
    metrics = Metrics()
    workers = [_worker(name, path, options, template, metrics) for name, path in named.items()]
    limits = Limits(**{name: options[name] for name in Limits.__dataclass_fields__ if name in options})
    service = Service(workers, limits, metrics)
    app = make_app(service, keys=keys, loopback=loopback, origins=origins)
    url, told = server.url_of(socket), ", ".join(named)
    server.serve(app, service, socket, lambda: print(log.line(f"serving {told} at {url}", url=url), flush=True))


def joined(arguments: list[str]) -> list[str]:
    """Return a command line with all checkpoints after one --ckpt_path, as often as that was said."""
    paths, rest, taking = list[str](), list[str](), False
    for word in arguments:
        if word.startswith("--"):
            taking = word == "--ckpt_path"
            if word.startswith("--ckpt_path="):
                paths.append(word.partition("=")[2])
            elif not taking:
                rest.append(word)
        elif taking:
            paths.append(word)
        else:
            rest.append(word)
    said = any(word.partition("=")[0] == "--ckpt_path" for word in arguments)
    return [*rest, *(["--ckpt_path", *paths] if said else [])]


def names(words: list[str]) -> dict[str, Path]:
    """Return checkpoints by the names that clients call them by: what was said, the run's, or the run's and the file's.

    Raises:
        UserError: Two have the same.
    """
    found: dict[str, Path] = {}
    runs = [Path(word).resolve().parent.name for word in words]
    for word, run in zip(words, runs, strict=True):
        said = re.fullmatch(r"([\w.:-]+)=(.+)", word)
        if said and not Path(word).exists():
            name, path = said[1], Path(said[2])
        else:
            path = Path(word)
            usual = path.suffix == ".ckpt" and re.fullmatch(r"best|last|step=\d+", path.stem) and run
            name = path.stem if not usual else run if runs.count(run) == 1 else f"{run}/{path.stem}"
        if name in found:
            raise UserError(f"--ckpt_path: two checkpoints are called {name}: say another name, as in NAME={path}")
        found[name] = path
    return found


def _worker(name: str, path: Path, options: Any, template: str | None, metrics: Any) -> Any:
    from lm.serving.worker import Worker

    fitted = load_network(path, devices.device(options.device), writes=True)
    if template is not None:
        fitted.tokenizer.chat = {**(fitted.tokenizer.chat or {}), "chat_template": template}
    net = packed(fitted.net, options.dtype)
    try:
        return Worker(name, net, fitted.tokenizer, slots=options.slots, metrics=metrics)
    except (RuntimeError, MemoryError) as error:
        if as_user_error(error) is None:
            raise
        raise UserError(f"--slots {options.slots}: memory does not suffice for their caches: say fewer") from error


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[\w.-]+(:\d+)?|https?://\[[\da-f:]+\](:\d+)?", text):
        raise UserError(f"--cors_origin {text[:100]}: no origin: say one like https://example.org")
    return text
