"""`lm bench`: how fast a recipe trains or writes on this machine, by part, and which of several ways is the fastest."""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc import locate
from statistics import median
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from lm.cli import common, devices, parsing
from lm.cli.fit import Fit
from lm.cli.plan import FLOPS, recipe_of, spelled
from lm.errors import CheckError, UserError
from lm.generation.sampling import start_tokens
from lm.planning import needs, speed
from lm.planning.turns import Turns, Wait
from lm.training import compute
from lm.training.callbacks.checkpointing import Checkpoints
from lm.training.callbacks.stopwatch import Stopwatch

ROUNDS = 9
SECONDS = 0.5  # of a turn, where --steps does not say how many steps it has
WARM_UP = 2  # steps: the first compiles, and makes the optimizer's state
ALIKE = 1.03  # the ratio of two times below which neither is called faster
HERE = "--model=HERE"
DTYPES = ("float32", "bfloat16", "int8")
COMPILE = "model.init_args.compile"
PARTS = ("data", "forward", "backward", "forward_backward", "update", "logging")


class _Options(parsing.FromWeights):
    """The options of `lm bench`."""

    command = "bench"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is timed, and how long."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=int | None, default=None, help="Of each; by default, seconds of them.")
        parser.add_argument("--generate", action="store_true", help="Time the tokens of a text, not training.")


class Bench(_Options, parsing.Untrained):
    """Parses a recipe, and what to time."""

    @property
    def device(self) -> torch.device:
        """Where the recipe computes."""
        return devices.of_recipe(self.config.trainer)

    @property
    def processes(self) -> int:
        """How many processes share the recipe's batch; one of them is timed."""
        return devices.processes(self.config.trainer)


class Timed(_Options, Fit):
    """`lm fit` of a recipe without an end, whose files are in a folder of its own.

    Args:
        arguments: The words of the command line after the command.
        processes: How many share the batch; this is one of them.
        folder: For the files.
    """

    def __init__(self, arguments: list[str], processes: int, folder: str) -> None:
        self.processes, self.folder = processes, folder
        super().__init__(arguments, "")

    def before_instantiate_classes(self) -> None:
        """Let it be one process, without evaluation."""
        trainer = self.config.trainer
        trainer.default_root_dir, trainer.devices, trainer.num_nodes, trainer.strategy = self.folder, 1, 1, "auto"
        trainer.max_steps, trainer.max_time, trainer.limit_val_batches, trainer.fast_dev_run = 10**9, None, 0, False
        super().before_instantiate_classes()


def train(arguments: list[str], processes: int, wait: Wait) -> None:
    """Be `lm fit`, whose steps are timed."""
    parsing.quiet()
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as folder:
        cli = Timed(arguments, processes, folder)
        data, accumulate = cli.datamodule, cli.config.trainer.accumulate_grad_batches
        data.batch_size = data.divided(processes, accumulate) * accumulate
        callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [*(one for one in callbacks if not isinstance(one, Checkpoints)), Stopwatch(wait)]
        cli.run()
    raise CheckError("training ended while it was timed: a callback of the recipe's stopped it")


def generate(arguments: list[str], dtype: Any, wait: Wait) -> None:
    """Write a text with a recipe's untrained network."""
    parsing.quiet()
    cli = Bench(arguments, "")
    net = recipe_of(cli, 1).make_net()
    start = getattr(net, "start_token", None)
    first = start_tokens(cli.datamodule.text_tokenizer, "")[0] if start is None else start
    speed.generation(net, first, dtype, cli.device, wait)


@dataclass(frozen=True)
class Way:
    """A way to train or to write, which is timed beside others.

    Args:
        name: What the table calls it.
        settings: What a recipe would say.
        measure: The work of its process.
        arguments: Of that.
    """

    name: str
    settings: dict[str, Any]
    measure: Callable[..., None]
    arguments: tuple[Any, ...]


def models_of(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the classes that `--model` names, and the words with HERE in the place of the first of them.

    Raises:
        UserError: One has no value.
    """
    found: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--model":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise UserError("--model: it has no value: name a class, such as lm.training.ManualLanguageModel")
        if not found:
            rest.append(HERE)
        found.append(value)
    return found, rest


def ways_to_train(cli: Bench, models: list[str], words: list[str]) -> Iterator[Way]:
    """Yield the recipe as it is; or each of several classes, compiled and not, unless the words say whether."""
    missing = compute.compiler_missing(cli.device)
    choices = [False] if missing else [False, True]
    if len(models) < 2 or any(word.partition("=")[0] == f"--{COMPILE}" for word in words):
        choices = [cli.config.model.init_args.compile is True]
    elif missing:
        print(f"note: {missing} is missing here: nothing is compiled", file=sys.stderr)
    for model in models or [cli.config.model.class_path]:
        for compiled in choices if getattr(locate(model), "compiles", False) else [False]:
            name = model.rpartition(".")[2] + ", compiled" * compiled
            own = with_model(words, model) if models else words
            arguments = ([*own, f"--{COMPILE}={str(compiled).lower()}"], cli.processes)
            yield Way(name, {"model": model, COMPILE: compiled}, train, arguments)


def ways_to_write(cli: Bench, words: list[str]) -> Iterator[Way]:
    """Yield each dtype of the weights."""
    for dtype in DTYPES if cli.device.type == "cpu" else DTYPES[:2]:
        yield Way(dtype, {"dtype": dtype}, generate, (words, dtype))


def with_model(words: list[str], model: str = "") -> list[str]:
    """Return words with a class in the place of HERE, where that is among them."""
    return [f"--model={model}" if word == HERE else word for word in words]


def measured(ways: list[Way], device: str, threads: int, steps: int | None) -> list[dict[str, Any]]:
    """Let the ways take turns; return a row of figures for each.

    Args:
        ways: What is measured.
        device: Where.
        threads: How many of them each has, on a CPU.
        steps: Of each way; None for half a second a turn.
    """
    with Turns(threads) as turns:
        ready = [turns.add(way.measure, *way.arguments) for way in ways]
        dtypes = [speed.dtype_of(one["precision"]) for one in ready]
        for dtype in (kinds := [*dict.fromkeys(dtypes)]):
            turns.add(speed.products, dtype, device)
        warm = [turns.take(number, {"steps": WARM_UP, "by_part": False}) for number in range(len(ways))]
        if steps is None:
            probe = turns.take(0, {"steps": WARM_UP, "by_part": False})
            each, count = max(1, round(1000 * SECONDS / probe["step_ms"])), ROUNDS
        else:
            count = min(ROUNDS, steps)
            each = math.ceil(steps / count)
        orders = [{"steps": each, "by_part": device == "cpu"}] * (len(ways) + len(kinds))
        found = turns.rounds(orders, count)
        apart = found if device == "cpu" else turns.rounds([one | {"by_part": True} for one in orders], 1)
    peaks = {kind: max(one["flops"] for one in turns_) for kind, turns_ in zip(kinds, found[len(ways) :], strict=True)}
    return [
        {
            "name": way.name,
            **way.settings,
            **ready[i],
            **figures(found[i], apart[i]),
            "first_steps_seconds": warm[i]["step_ms"] * warm[i]["steps"] / 1000,
            "peak_flops": peaks[dtypes[i]],
        }
        for i, way in enumerate(ways)
    ]


def figures(turns: list[dict[str, Any]], apart: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a way's figures from the reports of its turns, and of those by part."""
    step_ms = median(turn["step_ms"] for turn in turns)
    parts = [part for part in PARTS if part in apart[0].get("parts_ms", ())]
    return {
        "step_ms": step_ms,
        "parts_ms": {part: median(turn["parts_ms"][part] for turn in apart) for part in parts},
        "tokens_per_second": 1000 * turns[0]["tokens"] / step_ms,
        "peak_memory_mb": turns[-1]["peak_memory_mb"],
    }


def run(cli: Bench, models: list[str], words: list[str], threads: int) -> dict[str, Any]:
    """Measure, and return what `--json` prints."""
    writes = cli.config.generate
    if writes and len(models) > 1:
        raise UserError("--generate: gradients take no part in it: say --model once, or not at all")
    for part, one in (("model", parsing.language_model(cli.model)), ("data", cli.datamodule)):
        if writes and not getattr(one, "writes", True):
            raise UserError(f"--generate: {part} {type(one).__name__} writes no text: leave it out")
    recipe = recipe_of(cli, cli.processes)
    flops = needs.flops_per_token(recipe, backward=not writes) * math.prod(recipe.tokens) / math.prod(recipe.targets)
    result = {"parameters": needs.parameters(recipe), "flops_per_token": flops}
    ways = [*(ways_to_write(cli, with_model(words, *models[:1])) if writes else ways_to_train(cli, models, words))]
    rows = measured(ways, cli.device.type, threads, cli.config.steps)
    for one in rows:
        one["mfu"] = flops * one["tokens_per_second"] / one["peak_flops"]
    rows = [{key: rounded(value) for key, value in one.items()} for one in rows]
    best = min(rows, key=lambda one: one["step_ms"])
    fastest = {key: best[key] for key in ("step_ms", "tokens_per_second", "peak_memory_mb")}
    said = {"advice": advice(rows, ways)} if len(rows) > 1 else {}
    return {**fastest, **result, "mfu": best["mfu"], **said, "rows": rows}


def rounded(value: Any) -> Any:
    """Return numbers to six digits, also in a dictionary."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of the rows."""
    parts = [part for part in PARTS if any(part in one["parts_ms"] for one in rows)]
    head = ["", "ms a step" if parts else "ms a token", *(part.replace("_", " + ") for part in parts)]
    lines = [[*head, "tokens/s", "memory, MB", "of the peak"]]
    for one in rows:
        times = (f"{one['parts_ms'][part]:.3g}" if part in one["parts_ms"] else "" for part in parts)
        figures = f"{one['tokens_per_second']:,.0f}", f"{one['peak_memory_mb']:,.0f}", f"{one['mfu']:.1%}"
        lines.append([one["name"], f"{one['step_ms']:.4g}", *times, *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        yield f"{name:<{widths[0]}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True))


def advice(rows: list[dict[str, Any]], ways: list[Way]) -> str:
    """Return a line that says which way is the fastest here, and the options that choose it."""
    best = min(range(len(rows)), key=lambda i: rows[i]["step_ms"])
    way, one, first = ways[best], rows[best], rows[0]
    ratio = first["step_ms"] / one["step_ms"]
    if ratio < ALIKE:
        return f"none is clearly faster here than {first['name']}"
    options = " ".join(
        f"--{name} {str(value).lower() if value in (True, False) else value}" for name, value in way.settings.items()
    )
    text = f"fastest here: {way.name}, {1 / ratio:.2f} of the time of {first['name']}: {options}"
    others = [other for other in rows if not other.get(COMPILE)]
    if one.get(COMPILE) and others:
        saved = (min(other["step_ms"] for other in others) - one["step_ms"]) / 1000
        cost = one["first_steps_seconds"] - min(other["first_steps_seconds"] for other in others)
        text += f"; compiling takes {cost:.0f} s, as much as {cost / saved:,.0f} steps save" if saved > 0 else ""
    return text


def bench(arguments: list[str]) -> None:
    """Run `lm bench`."""
    parsing.quiet()
    models, words = models_of(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that there are no others, which a fork would lose
    try:
        cli = Bench(with_model(words, *models[:1]), "Time a recipe's training steps, or its text. Nothing is written.")
        result = run(cli, models, words, threads)
    finally:
        torch.set_num_threads(threads)
    rows, stream = result["rows"], common.output(cli.config.json)
    kind = cli.config.model.init_args.net.class_path.rpartition(".")[2]
    flops = spelled(result["flops_per_token"], FLOPS)
    where = f"1 x {cli.device.type}" + f", {threads} threads" * (cli.device.type == "cpu")
    print(f"{kind}: {result['parameters']:,} parameters, {flops} a token; {where}", *table(rows), sep="\n", file=stream)
    for dtype, peak in {speed.dtype_of(one["precision"]): one["peak_flops"] for one in rows}.items():
        print(f"the peak: {peak / 1e9:,.0f} GFLOP/s, of a product of matrices in {dtype}", file=stream)
    if "advice" in result:
        print(result["advice"], file=stream)
    if cli.config.json:
        common.print_json(result)
