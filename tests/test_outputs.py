"""Nothing that lm did not write itself is ever replaced or removed, whatever a command is told to write to."""

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lm.cli import COMMANDS
from tests.conftest import start
from tests.support.cases import often

LAST = Path("checkpoints/tiny/last.ckpt")
WRITERS = {
    "export": ("export", "--ckpt_path", LAST, "--output"),
    "export file": ("export", "--ckpt_path", LAST, "--format", "file", "--output"),
    "import": ("import", "--source", "exported", "--output"),
    "prepare": ("prepare", "--source", "text.txt", "--tokenizer", "byte", "--output"),
    "report": ("report", "tiny", "--output"),
    "tokenizer": ("tokenizer", "--source", "text.txt", "--vocab_size", 260, "--output"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and an export of it."""
    import yaml

    from tests.conftest import RECIPE, TEXT

    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    for words in (("fit", "--config", "tiny.yaml", "--trainer.max_steps", 1), (*WRITERS["export"], "exported")):
        process = start(*words, cwd=folder, environment={"LM_DATA_HOME": str(folder / "data")})
        assert process.wait(100) == 0, process.communicate()
    return folder


@pytest.fixture
def place(workplace: Path, made: Path) -> Path:
    """The workplace, with the checkpoint and the export; a run begun in it has the tokens ready."""
    for name in ("checkpoints", "exported", "data"):
        subprocess.run(["cp", "-r", made / name, workplace / name], check=True)
    return workplace


def user(path: Path) -> Path:
    """Make a folder of a user's files."""
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    (path / "sub").mkdir()
    (path / "sub" / "last.ckpt").write_text("more of it")
    (path / "manifest.json").write_text("{}")
    return path


def picture(*paths: Path) -> dict[str, object]:
    """Return all that lies at and under paths: kinds, contents, where links lead."""
    found: dict[str, object] = {}
    for top in paths:
        for path in (top, *sorted(top.rglob("*") if top.is_dir() else [])):
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = path.read_bytes()
            elif os.path.lexists(path):
                found[str(path)] = stat.S_IFMT(path.stat().st_mode), path.stat().st_rdev, path.stat().st_ino
    return found


def device(path: Path) -> None:
    """Make what /dev/null is; a pipe where that is not allowed."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        os.mkfifo(path)


def a_file(path: Path) -> None:
    path.write_text("the user's")


def a_checkpoint_of_another_program(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 3}, file)


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "a folder": user,
    "an empty folder": lambda path: path.mkdir(),
    "a file": a_file,
    "a checkpoint of another program": a_checkpoint_of_another_program,
    "a device": device,
    "a dead link": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: path.symlink_to("elsewhere"),
    "a link to a file": lambda path: path.symlink_to("elsewhere/thesis.txt"),
    "a link to a checkpoint": lambda path: path.symlink_to(LAST.absolute()),
}


def test_every_command_with_an_output_is_tried_here(lm, capfd: pytest.CaptureFixture[str]) -> None:
    found = set()
    others = {"fit", "validate", "test", "doctor", "exercises"}  # fixed places; and what adds to a folder what it lacks
    for command in COMMANDS.keys() - others:
        with pytest.raises(SystemExit):
            lm(command, "--help.all")
        if "--output" in capfd.readouterr().out:
            found.add(command)
    assert found == {words[0] for words in WRITERS.values()}


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_the_users_is_refused(lm, place: Path, command: str, overwrite: bool) -> None:
    user(place / "elsewhere")
    words = WRITERS[command]
    for name, make in OBSTACLES.items():
        if (command, name) == ("prepare", "an empty folder"):
            continue  # it prepares into one
        path = place / "out.tiktoken"
        make(path)
        refused(lm, place, path, (*words, path.name, *["--overwrite"] * overwrite), name)
        subprocess.run(["rm", "-r", path], check=True)
    for output in ("", ".", "..", "/", "text.txt/x.tiktoken", "text.txt/x/y.tiktoken", "n" * 300 + ".tiktoken"):
        refused(lm, place, place, (*words, output, *["--overwrite"] * overwrite), output)


def refused(lm, place: Path, path: Path, words: tuple[object, ...], what: str) -> None:
    before = picture(place)
    code, out, err = lm(*words)
    assert (code, out) == (2, "") and err.startswith("error: --output") and len(err.splitlines()) == 1, (what, err)
    assert picture(place) == before, what


@pytest.mark.parametrize("command", WRITERS)
def test_what_lm_wrote_is_replaced_on_request_alone(lm, place: Path, command: str) -> None:
    words = (*WRITERS[command], "out.tiktoken")
    assert lm(*words)[0] == 0
    first = picture(place / "out.tiktoken")
    code, _, err = lm(*words)
    if command == "prepare":  # the same corpus: there is nothing to do
        assert code == 0 and picture(place / "out.tiktoken") == first
        words = (*words, "--val_fraction", 0.5)
        code, _, err = lm(*words)
    assert code == 2 and "--overwrite" in err and len(err.splitlines()) == 1
    assert picture(place / "out.tiktoken") == first
    code, _, err = lm(*words, "--overwrite")
    assert code == 0, err
    assert picture(place / "out.tiktoken").keys() == first.keys()
    assert not [path for path in place.rglob("*") if ".part" in path.name]
    if (place / "out.tiktoken").is_dir():  # with something of the user's, it is no longer lm's alone
        (place / "out.tiktoken" / "thesis.txt").write_text("years of work")
        others = ("--val_fraction", 0.4) if command == "prepare" else ()
        refused(lm, place, place / "out.tiktoken", (*words, *others, "--overwrite"), "a file beside")


def test_a_prepared_corpus_takes_no_tokenizer_of_another_program_away(lm, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    refused(lm, place, place / "out", (*WRITERS["prepare"], "out"), "another program's tokenizer.json")


PLAN = '{"plan": "build the house", "budget": 3}'
NESTED = '{"plan": {"source": "a quarry", "tokenizer": 1}, "place": "here", "format": "a list"}'


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": PLAN},
        {"manifest.json": NESTED},
        {"progress.json": NESTED, "train-1.tokens": "of a reward"},
        {"progress.json": PLAN, "train-1.tokens": "of a reward"},
        {"progress.json": "[" * 100_000},
    ],
)
def test_a_prepared_corpus_takes_no_plan_of_another_program_away(
    lm, place: Path, files: dict[str, str], overwrite: bool
) -> None:
    (place / "out").mkdir()
    for name, text in files.items():
        (place / "out" / name).write_text(text)
    words = (*WRITERS["prepare"], "out", *["--overwrite"] * overwrite)
    refused(lm, place, place / "out", words, "another program's plan")
    assert f"its {next(iter(files))} is not lm prepare's" in lm(*words)[2]


@pytest.mark.parametrize("name", ["train-1.tokens", "val-00007.part", "progress.json"])
def test_a_corpus_with_a_file_of_anothers_is_not_replaced(lm, place: Path, name: str) -> None:
    assert lm(*WRITERS["prepare"], "out")[0] == 0
    (place / "out" / name).write_text(PLAN)
    words = (*WRITERS["prepare"], "out", "--val_fraction", 0.5, "--overwrite")
    refused(lm, place, place / "out", words, name)
    assert f"holds other files ({name})" in lm(*words)[2]


RUN = ("fit", "--config", "tiny.yaml", "--name", "new", "--trainer.max_steps", 6)


@pytest.mark.parametrize("where", ["checkpoints", "logs", "checkpoints/new", "logs/new"])
def test_a_run_whose_folders_are_no_folders_is_refused(lm, place: Path, where: str) -> None:
    subprocess.run(["rm", "-r", "checkpoints"], check=True)
    path = place / where
    for make in (a_file, device, OBSTACLES["a dead link"]):
        path.parent.mkdir(exist_ok=True)
        make(path)
        before = picture(place)
        code, _, err = lm(*RUN)
        assert code == 2 and len(err.splitlines()) == 1 and f"error: {where}" in err, err
        assert picture(place) == before
        path.unlink()


def fit(lm, *words: object) -> str:
    code, _, err = lm(*RUN, *words)
    assert code in (0, 2) and "Traceback" not in err, err
    assert code == 0 or len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    return err


@pytest.mark.parametrize(
    "make", often([user, a_file, a_checkpoint_of_another_program, OBSTACLES["a link to a folder"]])
)
@pytest.mark.parametrize(
    "name",
    often(
        [
            *("last.ckpt", "best.ckpt", "step=0000005.ckpt", ".lock", ".last.ckpt.new.part", ".probe.notes"),
            *(".last.ckpt.old.part", ".best.ckpt.copy.part", "notes.part", ".last.ckpt.notes.part"),
        ],
        5,
    ),
)
def test_a_run_leaves_what_it_did_not_write(lm, place: Path, name: str, make: Callable[[Path], object]) -> None:
    user(place / "checkpoints" / "elsewhere")
    (place / "checkpoints" / "new").mkdir()
    path = place / "checkpoints" / "new" / name
    make(path)
    before = picture(path, place / "checkpoints" / "elsewhere")
    errors = fit(lm, "--ckpt_path", "auto", "--checkpoint.keep_last", 1)
    assert picture(path, place / "checkpoints" / "elsewhere") == before, errors


@pytest.mark.parametrize("make", often([a_file, user, OBSTACLES["a dead link"]]))
@pytest.mark.parametrize(
    "name", ["metrics.csv", "metrics.prom", "metrics.part", "config.yaml", "config-2.yaml", "events.out.tfevents.1"]
)
def test_logs_leave_what_they_did_not_write(lm, place: Path, name: str, make: Callable[[Path], object]) -> None:
    (place / "logs" / "new").mkdir(parents=True)
    make(path := place / "logs" / "new" / name)
    before = picture(path)
    error = fit(lm)
    assert picture(path) == before
    assert name not in ("metrics.csv", "metrics.prom") or str(path.relative_to(place)) in error


def test_retention_leaves_what_it_did_not_write(lm, place: Path) -> None:
    code, _, err = lm(*RUN, "--checkpoint.every_n_steps", 2)
    assert code == 0, err
    run = place / "checkpoints" / "new"
    user(run / "step=0000001.ckpt")
    (run / "step=notes.ckpt").write_bytes((run / "step=0000002.ckpt").read_bytes())
    (run / "step=0000003.ckpt").symlink_to("step=0000002.ckpt")
    before = picture(run / "step=0000001.ckpt", run / "step=notes.ckpt")
    words = ("--ckpt_path", "last", "--trainer.max_steps", 8, "--checkpoint.every_n_steps", 2)
    code, _, err = lm(*RUN, *words, "--checkpoint.keep_last", 1)
    assert code == 0, err
    assert picture(run / "step=0000001.ckpt", run / "step=notes.ckpt") == before
    assert (run / "step=0000003.ckpt").is_symlink()
    assert (run / "step=0000008.ckpt").exists() and not (run / "step=0000004.ckpt").exists()
