"""The process that runs chat templates: a line of JSON in, a line of JSON out.

The budget of a template is the kernel's to hold: a timer of the process's own time, whose signal ends the process, even
inside an operation that never returns to Python, and limits of memory and files.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0
MEMORY = 512 << 20
LONGEST = 1 << 20  # characters of what a template writes


class Generation(Extension):
    """The block `generation`, by which training finds the assistant's words: what is in it is written."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what the block has."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for: transformers'."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )  # fmt: skip

    def refuse(message: Any) -> None:
        raise TemplateError(str(message))

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def as_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **more)

    made.filters["tojson"] = as_json
    made.globals |= {"raise_exception": refuse, "strftime_now": now}
    return made


@functools.lru_cache(maxsize=4)
def parsed(template: str) -> Template:
    """Return a template, which is read once for all of a corpus's conversations."""
    return environment().from_string(template)


def rendered(template: str, variables: dict[str, Any]) -> str:
    """Return a template's text.

    Raises:
        ValueError: It is too long.
    """
    parts, length = [], 0
    for part in parsed(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise ValueError(f"it writes more than {LONGEST:,} characters")
    return "".join(parts)


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = {"text": rendered(asked["template"], asked["variables"])}
        except RecursionError:
            answer = {"error": "it is nested too deeply"}
        except MemoryError:
            answer = {"error": "it takes more than its budget of memory"}
        except Exception as error:  # whatever a template does wrong is its own
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
