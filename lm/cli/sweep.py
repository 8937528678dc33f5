"""`lm sweep`: a search over the settings of a recipe."""

import errno
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lm import log, storage
from lm.cli import common, plain_help, streams, values, yaml_files
from lm.errors import CheckError, Stopped, UserError, take_stops
from lm.experiments import spec
from lm.experiments.processes import Processes
from lm.experiments.space import corners

SECONDS = 60.0  # for trials to save, when the sweep is stopped


def make_parser() -> ArgumentParser:
    """Return the parser of `lm sweep`."""
    parser = plain_help.make_parser(
        "sweep",
        "Search the settings of a recipe for those that train best. Killed and started again, it goes on.",
    )
    parser.add_argument("--config", type=Path, required=True, help="The sweep: see configs/sweeps/.")
    parser.add_argument("--name", type=str | None, default=None, help="Its name, else the config file's; in sweeps/.")
    parser.add_argument("--workers", type=int, default=1, help="Trials at a time, each with its share of the cores.")
    parser.add_argument(
        "--storage", type=str | None, default=None, help="An Optuna URL, for many machines; else a file in sweeps/NAME."
    )
    parser.add_argument(
        "--node", type=int | None, default=None, help="This machine's number, of several that run the same sweep [0]."
    )
    parser.add_argument("--json", action="store_true", help="Print the result as JSON; progress goes to stderr.")
    return parser


def sweep(arguments: list[str]) -> None:
    """Run `lm sweep`."""
    options = values.parse(make_parser(), arguments)
    name = options.name or options.config.stem
    if not re.fullmatch(r"[\w][\w.=+-]{0,99}", name):
        raise UserError(f"--name {name[:60]}: use letters, digits, '.', '_', '-', '+' and '=', at most 100")
    found = spec.read(options.config, yaml_files.parse)
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("lm sweep needs Optuna: pip install 'lm[sweep]'") from error
    node = options.node if options.node is not None else int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
    folder = Path("sweeps") / name
    with streams.losable(), storage.folder_made(folder), alone(folder, node), ExitStack() as exits:
        began = time.monotonic()
        processes = Processes({})  # imports while the storage is opened
        try:
            result = _search(found, options, name, folder, node, processes, exits)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{error.filename or folder}: {error.strerror}: make room; then the same command goes on"
            ) from error
        except Stopped as stop:
            stop.args = (f"{stop}; the trials are in {folder}: the same command continues",)
            raise
        finally:
            processes.close()
        seconds = round(time.monotonic() - began, 3)
    if options.json:
        common.print_json(result | {"seconds": seconds})
    if result["best"] is None:
        raise CheckError(f"no trial was completed; what they said is in {folder / 'recipes'}")


def _search(
    found: spec.Spec, options: Any, name: str, folder: Path, node: int, processes: Processes, exits: ExitStack
) -> dict[str, Any]:
    """Run the trials, and return what `--json` prints."""
    from lm.experiments.study import Lock, Trials, open_storage
    from lm.experiments.sweep import Sweep, checkpoint_of

    stream = common.output(options.json)

    def say(text: str, **fields: Any) -> None:
        print(log.line(text, run=name, **fields), file=stream, flush=True)

    place = Path(exits.enter_context(tempfile.TemporaryDirectory()))
    fresh = not (folder / "journal.log").exists()
    if fresh:  # bad settings leave nothing
        _check(found, place, processes, options.config)
    trials = Trials(found, open_storage(options.storage, folder), name, Lock(folder / ".choosing.lock"), node)
    work = Sweep(trials, folder, options.workers, processes, say)
    left = [trial for trial in trials.all() if not trial.state.is_finished()]
    with adopted(folder, node, {trial.user_attrs.get("node", 0) for trial in left}) as nodes:
        work.left_over = [trial for trial in left if trial.user_attrs.get("node", 0) in nodes]
        done = len(trials.all()) - len(left)
        if done or work.left_over:
            say(f"{name}: {done} trials are done, {len(work.left_over)} unfinished ones go on")
        if done < found.trials and not fresh:
            _check(found, place, processes, options.config)
        before = take_stops(_raise)
        try:
            work.run()
        except Stopped:
            take_stops(signal.SIG_IGN)
            processes.stop(SECONDS)
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
    ends = [trial.state.name for trial in trials.all()]
    best = trials.best()
    result: dict[str, Any] = {"best": None, "trials": len(ends)}
    if best is not None:
        run = f"trial-{best.number:04d}" + ("-seed-0" if found.seeds > 1 else "")
        result["best"] = {
            "trial": best.number,
            "value": best.value,
            "settings": trials.values(best),
            "recipe": str(folder / "best.yaml"),
            "ckpt_path": str(checkpoint_of(folder, run) or "") or None,
        }
        say(f"best: trial {best.number}, {found.metric} {best.value:.4f}; lm fit --config {folder / 'best.yaml'}")
    result |= {"complete": ends.count("COMPLETE"), "pruned": ends.count("PRUNED"), "failed": ends.count("FAIL")}
    say(f"{len(ends)} trials: {result['complete']} complete, {result['pruned']} given up, {result['failed']} failed")
    return result


def _check(found: spec.Spec, place: Path, processes: Processes, config: Path) -> None:
    """Have recipes parsed that have all choices and the ends of ranges; errors name the sweep's file, and a variant."""
    from lm.experiments.sweep import write_yaml

    names = {}
    for i, chosen in enumerate(corners(found.settings)):
        file = place / f"settings-{i}.yaml"
        names[str(file)] = f"{config}: with variant {chosen[spec.VARIANT]}" if found.variants else str(config)
        write_yaml(file, found.recipe_of(chosen))
    try:
        processes.check([*map(Path, names)])
    except UserError as error:
        text = re.sub(
            rf"{re.escape(str(place))}/[\w.-]+(?:, line \d+)?", lambda file: names[file[0].split(",")[0]], error.text
        )
        raise UserError(text) from error


def _raise(signum: int, frame: Any) -> None:
    raise Stopped(signum)


@contextmanager
def alone(folder: Path, node: int) -> Iterator[None]:
    """Keep other sweeps out of a machine's part of a folder; the processes of a killed one may take a moment to end."""
    refusal = f"{folder}: another lm sweep is at work in it: wait for it, or say another --name or, to help it, --node"
    for attempt in range(10):
        with ExitStack() as held:
            try:
                held.enter_context(storage.alone(folder / f".node-{node}.lock", refusal))
            except UserError:
                if attempt == 9:
                    raise
                time.sleep(0.2)
                continue
            yield
            return


@contextmanager
def adopted(folder: Path, node: int, others: set[int]) -> Iterator[set[int]]:
    """Hold the places of machines that are no longer at work; yield their numbers, and this one's."""
    with ExitStack() as held:
        nodes = {node}
        for other in others - nodes:
            with suppress(UserError):
                held.enter_context(storage.alone(folder / f".node-{other}.lock", "at work"))
                nodes.add(other)
        yield nodes
