"""What is logged is there to the end, whatever happens to the files meanwhile."""

import csv
import errno
import shutil
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from lm.errors import UserError
from lm.training.loggers import log_files
from lm.training.loggers.events import Events, event_files
from lm.training.loggers.log_files import MetricsCSV, forget
from tests.support.cases import often

LOGS = Path("logs/tiny")


class Remove(Callback):
    """Removes something from the logs while training goes on.

    Args:
        pattern: What; nothing is the folder itself.
        steps: After which steps.
    """

    def __init__(self, pattern: str, steps: list[int]) -> None:
        self.pattern, self.steps = pattern, steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step not in self.steps:
            return
        for path in list(LOGS.glob(self.pattern)) if self.pattern else [LOGS]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps() -> list[str]:
    with (LOGS / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("pattern", ["", "metrics.csv", "metrics.prom", "events.*", "*"])
def test_logs_that_are_removed_are_made_again_and_it_is_said_once(lm, workplace: Path, pattern: str) -> None:
    callback = f'{{"class_path": "{__name__}.Remove", "init_args": {{"pattern": "{pattern}", "steps": [4, 7]}}}}'
    code, out, err = lm("fit", "--config", "tiny.yaml", "--trainer.callbacks", f"[{callback}]")
    assert code == 0 and "done: step 12" in out, err
    assert len(err.splitlines()) == 1 and "was removed while training went on: it is made again" in err
    assert steps()[-3:] == ["10", "11", "12"]
    assert all((LOGS / name).is_file() for name in ("metrics.csv", "metrics.prom"))
    assert events() >= {9, 10, 11, 12}
    assert not list(LOGS.glob(".*"))


def events() -> set[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(LOGS))
    read.Reload()
    return {event.step for event in read.Scalars("train/loss")}


def test_a_table_of_another_is_not_written_into(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    (tmp_path / "notes").write_text("years of work, nothing else\n" * 9)
    (tmp_path / "notes").replace(tmp_path / "metrics.csv")
    with pytest.raises(UserError, match="not the table that lm wrote"):
        logger.log_metrics({"loss": 2.0}, 2)
    assert (tmp_path / "metrics.csv").read_text() == "years of work, nothing else\n" * 9


def test_a_file_of_events_that_is_none_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.notes"
    path.write_text("years of work, nothing else\n" * 9)
    forget(tmp_path, 0)
    assert path.read_text() == "years of work, nothing else\n" * 9 and event_files(tmp_path) == [path]


@pytest.mark.parametrize(
    "words",
    [
        ("--data.init_args.corpus", "nowhere.txt"),
        ("--data.init_args.block_size", 10**5),
        ("--model.init_args.optimizer", "torch.optim.LBFGS"),
        ("--ckpt_path", "checkpoints/old/last.ckpt", "--model.init_args.net.init_args.n_embd", 32),
        ("--init_from", "checkpoints/old/last.ckpt", "--model.init_args.net.init_args.n_embd", 32),
    ],
)
def test_a_start_that_is_refused_leaves_nothing(lm, workplace: Path, words: tuple[object, ...]) -> None:
    if words[0] in ("--ckpt_path", "--init_from"):
        assert lm("fit", "--config", "tiny.yaml", "--name", "old", "--trainer.max_steps", 1)[0] == 0
    before = {path for path in workplace.rglob("*") if "data" not in path.parts}
    code, _, err = lm("fit", "--config", "tiny.yaml", *words)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert {path for path in workplace.rglob("*") if "data" not in path.parts} == before


@pytest.mark.parametrize("refused", ["r+b", "xb"])
def test_a_row_that_the_disk_refuses_comes_with_the_next(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, opened = log_files.MetricsCSV(tmp_path), Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode == refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **kwargs)  # type: ignore[call-overload]

    table.log_metrics({"loss": 1.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError, match="No space"):
            table.log_metrics({"loss": 2.0, "new": 0.5}, 2)
    table.log_metrics({"loss": 3.0}, 3)
    table.log_metrics({"val": 4.0}, 3)

    columns, rows = log_files.read_csv(tmp_path / "metrics.csv")
    assert columns == ["step", "loss", "new", "val"]
    said = [(row["step"], row["loss"], row["val"]) for row in rows]
    assert said == [("1", "1.0", ""), ("2", "2.0", ""), ("3", "3.0", "4.0")]


class Put(Callback):
    """Does something to a file of the logs after step 5.

    Args:
        pattern: Which file.
        how: over: another file takes its place; into: a longer text is written into it; after: at its end.
    """

    def __init__(self, pattern: str, how: str) -> None:
        self.pattern, self.how = pattern, how

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == 5:
            (path,) = LOGS.glob(self.pattern)
            if self.how == "over":
                path.unlink()
            mode = {"over": "wb", "into": "r+b", "after": "ab"}[self.how]
            with path.open(mode) as file:
                file.write(THEIRS)
            Path("theirs").write_bytes(path.read_bytes())
            Path("name").write_text(str(path))


THEIRS = b"step,grade\n" + b"1,of a thesis\n" * 400


@pytest.mark.parametrize("how", often(["over", "into", "after"], 2))
@pytest.mark.parametrize("pattern", ["metrics.csv", "metrics.prom", "events.*"])
def test_the_users_bytes_in_a_log_are_never_changed(lm, workplace: Path, pattern: str, how: str) -> None:
    callback = f'{{"class_path": "{__name__}.Put", "init_args": {{"pattern": "{pattern}", "how": "{how}"}}}}'
    code, out, err = lm("fit", "--config", "tiny.yaml", "--trainer.callbacks", f"[{callback}]")
    assert code == 0 and "done: step 12" in out, err
    path = Path(Path("name").read_text())
    theirs = Path("theirs").read_bytes()
    if (pattern, how) == ("events.*", "after"):  # TensorBoard's writer appends to what was appended
        assert path.read_bytes().startswith(theirs) and not err
        return
    assert path.read_bytes() == theirs
    assert len(err.splitlines()) == 1 and str(path) in err, err
    assert ("was removed while training went on" in err) == (pattern == "events.*"), err


def test_no_event_is_written_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RecordWriter.write

    def slowly(self: RecordWriter, data: bytes) -> None:
        time.sleep(0.01)  # in TensorBoard's thread, which appends to whatever has the file's name by then
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", slowly)
    logger = Events(tmp_path / "run")
    logger.log_metrics({"train/loss": 1.0, "val/loss": 1.0}, 1)
    (path,) = event_files(tmp_path / "run")
    path.write_bytes(THEIRS)
    time.sleep(0.1)
    logger.log_metrics({"train/loss": 2.0}, 2)
    logger.finalize("success")
    assert path.read_bytes() == THEIRS and len(event_files(tmp_path / "run")) == 2


def test_a_table_that_an_editor_saved_as_it_was_is_gone_on_with(tmp_path: Path) -> None:
    table, path = MetricsCSV(tmp_path), tmp_path / "metrics.csv"
    table.log_metrics({"loss": 1.0}, 1)
    table.log_metrics({"loss": 2.0}, 2)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    table.log_metrics({"loss": 3.0}, 3)
    path.write_bytes(b"mine")
    for step in (4, 5):
        with pytest.raises(UserError, match="not the table that lm wrote: it is left alone, move"):
            table.log_metrics({"loss": 4.0}, step)
    path.rename(tmp_path / "away")
    table.log_metrics({"loss": 6.0}, 6)
    assert (tmp_path / "away").read_bytes() == b"mine"
    assert [row["step"] for row in log_files.read_csv(path)[1]] == ["3", "4", "5", "6"]


def test_a_refusal_after_the_last_row_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": float(step)}, step=step)
    written = logger.path.read_bytes()
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode == "r+b":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    logger.save()  # has nothing to write
    with pytest.raises(OSError, match="Read-only"):
        logger.log_metrics({"loss": 3.0}, step=2)
    assert logger.path.read_bytes() == written


def their_events() -> list[Path]:
    """Write scalars as another program does, and return the files."""
    writer = SummaryWriter(str(LOGS))
    for step in range(50):
        writer.add_scalar("other/reward", step / 50, step)
        writer.add_scalar("train/loss", step / 50, step)
    writer.close()
    return event_files(LOGS)


def test_another_programs_events_are_left_alone(lm, workplace: Path) -> None:
    theirs = {path: path.read_bytes() for path in their_events()}
    for words in ((), ("--ckpt_path", "checkpoints/tiny/step=0000005.ckpt", "--trainer.max_steps", 8)):
        code, _, err = lm("fit", "--config", "tiny.yaml", *words)
        assert code == 0, err
        assert {path: path.read_bytes() for path in theirs} == theirs
    assert steps() == [*map(str, range(1, 9))]
    assert all(path.name.endswith(".lm") for path in {*event_files(LOGS)} - theirs.keys())


def test_a_run_that_starts_anew_keeps_an_earlier_ones_logs(lm, workplace: Path) -> None:
    for number in ("1", "2"):
        assert lm("fit", "--config", "tiny.yaml")[0] == 0
        before = sorted(path.read_bytes() for path in [*LOGS.glob("metrics.*"), *event_files(LOGS)])
        shutil.rmtree("checkpoints/tiny")
        code, out, _ = lm("fit", "--config", "tiny.yaml")
        assert code == 0 and f"note: {LOGS} has an earlier run's logs: they are kept in {LOGS}/earlier-{number}" in out
        assert sorted(path.read_bytes() for path in (LOGS / f"earlier-{number}").iterdir()) == before
        assert steps() == [*map(str, range(1, 13))] and len(event_files(LOGS)) == 1
        shutil.rmtree("checkpoints/tiny")
        for path in [*LOGS.glob("metrics.*"), *event_files(LOGS)]:
            path.unlink()


def test_an_earlier_releases_events_are_cut_behind_the_checkpoint(lm, workplace: Path) -> None:
    assert lm("fit", "--config", "tiny.yaml")[0] == 0
    (path,) = event_files(LOGS)
    earlier = path.rename(path.with_suffix(""))
    before = earlier.read_bytes()
    forget(LOGS, 5)
    assert earlier.read_bytes() == before[: earlier.stat().st_size] and events() == {*range(1, 6)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.csv", "step,reward,comment\n1,0.5,a\n"),
        ("metrics.csv", "step\n1\n"),
        ("metrics.prom", "# HELP lm_sensors_temp of a CPU\n# TYPE lm_sensors_temp gauge\nlm_sensors_temp 40.0\n"),
        ("metrics.prom", '# TYPE lm_steps gauge\nlm_steps{run="tiny"} 40.0\n'),
    ],
)
def test_another_programs_metrics_are_refused_and_kept(lm, workplace: Path, name: str, text: str) -> None:
    LOGS.mkdir(parents=True)
    (LOGS / name).write_text(text)
    code, _, err = lm("fit", "--config", "tiny.yaml")
    assert code == 2 and f"error: {LOGS / name} " in err and "move it away" in err and len(err.splitlines()) == 1
    assert [path.name for path in LOGS.iterdir()] == [name] and (LOGS / name).read_text() == text


def test_an_earlier_releases_metrics_are_lms(tmp_path: Path) -> None:
    (tmp_path / "metrics.prom").write_text('# TYPE lm_step gauge\nlm_step{run="tiny"} 12\n')
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,4.0\n")
    log_files.check(tmp_path)
