"""`lm solve`: the answers of a network that was trained on problems."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser
from torch import nn

from lm.checkpoints.restore import Fitted, deny_what_runs_code, load_network
from lm.cli import common, devices, plain_help, values
from lm.errors import CheckError, UserError
from lm.generation.packed import packed
from lm.generation.sampling import Sampler, start_tokens
from lm.generation.side_by_side import continued

if TYPE_CHECKING:
    from lm.data.tasks import TaskData

CALCULATOR = Path("checkpoints/calculator/best.ckpt")
AT_A_TIME = 1000
ALL = "all"


def make_parser() -> ArgumentParser:
    """Return the parser of `lm solve`."""
    about = 'Answer problems by a network that was trained on such, lm solve "12*34"; the likeliest answer, always.'
    parser = plain_help.make_parser("solve", about)
    parser.add_argument(
        "problems", type=str, nargs="*", default=None, metavar="PROBLEM", help="As people write it; one or several."
    )
    parser.add_argument("--ckpt_path", type=Path, default=CALCULATOR, help="The checkpoint.")
    parser.add_argument("--show_steps", action="store_true", help="Print the steps, too, where the network writes any.")
    parser.add_argument(
        "--split",
        type=Literal["val", "test"] | None,
        default=None,
        help="Solve the problems that training held out, and print how many results of each kind are right.",
    )
    devices.add_options(parser)
    parser.add_argument("--json", action="store_true", help="Print the result as JSON; the text goes to stderr.")
    return parser


def solve(arguments: list[str]) -> None:
    """Run `lm solve`."""
    options = values.parse(make_parser(), arguments)
    if bool(options.problems) == bool(options.split):
        raise UserError('lm solve takes problems, as lm solve "12*34", or --split test: say one of them')
    if options.ckpt_path == CALCULATOR and not CALCULATOR.exists():
        raise UserError(f"--ckpt_path {CALCULATOR}: there is none: lm fit --config configs/tasks/calculator.yaml")
    fitted = load_network(options.ckpt_path, devices.device(options.device), writes=True)
    task, net = _task(options.ckpt_path, fitted), packed(fitted.net, options.dtype)
    if options.split:
        _print_table(task, fitted, net, options)
        return
    asked = [task.question(problem) for problem in options.problems]
    out = common.output(options.json)
    solutions: list[dict[str, str]] = []
    for (problem, _), answer in zip(asked, answers(task, fitted, net, [one for _, one in asked]), strict=True):
        if answer is None:
            raise CheckError(f"{problem} the network's answer has no end: train it longer")
        found = {"problem": problem, "answer": task.readable(answer), "steps": task.readable_steps(answer)}
        print(f"{problem}{found['steps']}" if options.show_steps else found["answer"], file=out, flush=True)
        solutions.append(found)
    if options.json:
        common.print_json({"solutions": solutions})


def _task(path: Path, fitted: Fitted) -> "TaskData":
    """Return the task that a network was trained on.

    Raises:
        UserError: That was none.
    """
    from lm.data.tasks import task_of  # imports Lightning, which takes a second

    deny_what_runs_code()
    task = task_of(fitted.data)
    if task is None:
        raise UserError(f"--ckpt_path {path}: it was not trained on problems: lm sample continues texts")
    return task


def answers(task: "TaskData", fitted: Fitted, net: nn.Module, problems: Sequence[str]) -> list[str | None]:
    """Return what the network answers to problems in the form that it was trained on; None where that has no end."""
    tokenizer = fitted.tokenizer
    found: list[str | None] = []
    for first in range(0, len(problems), AT_A_TIME):
        prompts = [start_tokens(tokenizer, problem) for problem in problems[first : first + AT_A_TIME]]
        settings: dict[str, Any] = {"sampler": Sampler(temperature=0), "longest": task.block_size}
        for new in continued(net, prompts, [0] * len(prompts), ends=tokenizer.stops, **settings):
            found.append(tokenizer.decode(new[:-1]) if new[-1] in tokenizer.stops else None)
    return found


def _print_table(task: "TaskData", fitted: Fitted, net: nn.Module, options: Any) -> None:
    """Solve what was held out, and print how many results of each kind are right; steps before one are not compared."""
    task.setup("test")
    examples = task.held_out_examples(options.split)
    right, there = Counter[str](), Counter[str]()
    for (problem, expected), answer in zip(
        examples, answers(task, fitted, net, [problem for problem, _ in examples]), strict=True
    ):
        for kind in {task.kind(problem), ALL}:
            there[kind] += 1
            right[kind] += answer is not None and task.result(answer) == task.result(expected)
    kinds = [*sorted(there.keys() - {ALL}), ALL]
    out = common.output(options.json)
    print(
        f"{options.split} at step {fitted.step}\n\n| problems | right | of | right result |\n{'| --- ' * 4}|", file=out
    )
    for kind in kinds:
        print(f"| {kind} | {right[kind]} | {there[kind]} | {right[kind] / there[kind]:.2%} |", file=out)
    if options.json:
        rows = [{"kind": kind, "right": right[kind], "problems": there[kind]} for kind in kinds[:-1]]
        total = {"right_result": right[ALL] / there[ALL], "problems": there[ALL]}
        common.print_json({**total, "kinds": rows, "step": fitted.step})
