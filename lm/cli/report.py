"""`lm report`: one page about runs."""

from pathlib import Path

from lm import outputs, storage
from lm.cli import common, plain_help, values
from lm.errors import CheckError, UserError
from lm.experiments import page, runs, scaling_page, sweep_page, terminal
from lm.experiments.runs import Run

USUAL = Path("report.html")
LARGEST = 50_000_000  # parameters of a network that is drawn: larger ones take long to load


def report(arguments: list[str]) -> None:
    """Run `lm report`."""
    parser = plain_help.make_parser(
        "report",
        "Write one HTML file about runs, or about a sweep: losses, rates, settings that differ, figures, samples.",
    )
    parser.add_argument("runs", nargs="*", type=str, metavar="RUN", help="Names, or folders of checkpoints/ or logs/.")
    parser.add_argument(
        "--output", type=Path | None, default=None, help="The file: a new one [report.html, which a report replaces]."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a report of lm's.")
    parser.add_argument("--text", action="store_true", help="Print it to the terminal instead.")
    parser.add_argument("--json", action="store_true", help="Print the file's path as JSON.")
    options = values.parse(parser, arguments)
    if not options.runs:
        raise UserError("RUN: nothing to report: name runs, as checkpoints/NAME or NAME, or a sweep's folder")
    if options.text and (options.json or options.output):
        raise UserError("--text prints to the terminal, --json and --output are about a file: drop one")
    output = USUAL if options.output is None else options.output
    if not options.text:
        overwrite = options.overwrite or options.output is None
        outputs.check_free(output, made="report", ours=_ours, overwrite=overwrite)
    notes: list[str] = []
    sweeps = [_sweep(folder) for one in options.runs if (folder := sweep_page.holds(one))]
    said = [one for one in options.runs if not sweep_page.holds(one)] + [run for one in sweeps for run in one.runs()]
    found, others = runs.find(said, ready=bool(sweeps))
    notes += [f"{other}: it is no run, and left out" for other in others if not Path(other).is_file()]
    if options.text:
        for one in sweeps:
            head, rows = one.rows()
            print(f"{terminal.grid([head, *rows])}\n")
        print(terminal.text(found, notes) if found else "no run of it is there yet")
        return
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    if len(options.runs) == len(sweeps) == 1:
        title = f"Sweep {sweeps[0].folder.name}"
    sections = [part for one in sweeps for part in one.sections(notes)]
    sections += scaling_page.sections(found)
    if found and not sweeps:
        sections += _pictures(found[0], several=len(found) > 1, notes=notes)
    text = page.page(title, found, sections, notes)
    output.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(output, text.encode())
    if options.json:
        common.print_json({"path": str(output)})
    else:
        print(f"report of {title}: {output} ({len(text) / 1e6:.1f} MB)")


def _sweep(folder: Path) -> "sweep_page.SweepReport":
    try:
        return sweep_page.SweepReport(folder)
    except ModuleNotFoundError as error:
        raise UserError(f"{folder}: a report of a sweep needs Optuna: pip install 'lm[sweep]'") from error


def _pictures(run: Run, *, several: bool, notes: list[str]) -> list[str]:
    """Return a section of pictures of a run's network, from its best checkpoint; what hinders that is noted."""
    paths = [path for name in ("best", "last") if (path := run.checkpoints / f"{name}.ckpt").is_file()]
    if not paths:
        return []
    if run.about.get("parameters", 0) > LARGEST:
        notes.append(f"{run.name}: no pictures of more than {LARGEST:,} parameters: lm inspect --figures draws them")
        return []
    from lm.cli import pictures  # imports torch, which takes seconds

    try:
        found = pictures.of_checkpoint(paths[0])
    except (UserError, CheckError) as error:
        notes.append(f"{run.name}: no pictures: {error.text}")
        return []
    title = f"Pictures of {paths[0].name} and the first batch{f' ({run.name})' * several}"
    return [page.pictures(title, found)]


def _ours(path: Path) -> bool:
    """Return whether lm wrote a report there."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return page.MARK.encode() in file.read(1000)
