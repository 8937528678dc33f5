"""What others do to a run's folder while it trains: nothing of theirs is replaced, and training goes on."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm.checkpoints import checkpoint
from lm.training.checkpoint_io import AtomicCheckpointIO
from tests.support.samples import CONTENTS

RUN = Path("checkpoints/tiny")
THESIS = b"a thesis"


class Harm(Callback):
    """Removes a run's folder, or puts a file of another's at a place in it, while training goes on.

    Args:
        name: The file's; nothing is for the folder.
        steps: After which steps.
    """

    def __init__(self, name: str, steps: list[int]) -> None:
        self.name, self.steps = name, steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step in self.steps:
            io: AtomicCheckpointIO = trainer.strategy.checkpoint_io  # type: ignore[assignment]
            io.writer.wait()
            if self.name:
                (RUN / self.name).unlink(missing_ok=True)
                (RUN / self.name).write_bytes(THESIS)
            else:
                shutil.rmtree(RUN)


class Block(Callback):
    """Puts something of another's at every name of the next checkpoints: pipes, a link, a folder."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == 6:
            io: AtomicCheckpointIO = trainer.strategy.checkpoint_io  # type: ignore[assignment]
            io.writer.wait()
            for name in ("last.ckpt", "best.ckpt"):
                (RUN / name).unlink(missing_ok=True)
                (RUN / name).symlink_to("step=0000005.ckpt")
            os.mkfifo(RUN / "step=0000010.ckpt")
            (RUN / "step=0000012.ckpt").mkdir()
            os.mkfifo(RUN / "step=0000012-2.ckpt")


def callback(name: str, *steps: int) -> tuple[str, str]:
    harm = f'{{"class_path": "{__name__}.Harm", "init_args": {{"name": "{name}", "steps": {list(steps)}}}}}'
    return "--trainer.callbacks", f"[{harm}]"


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_file_of_anothers_is_left_alone_and_training_goes_on(lm, workplace: Path, name: str) -> None:
    code, out, err = lm("fit", "--config", "tiny.yaml", *callback(name, 3))
    assert code == 0, err
    assert len(err.splitlines()) == 1 and f"note: {RUN / name} is in the way and was not written by lm" in err, err
    assert (RUN / name).read_bytes() == THESIS
    newest = RUN / ("step=0000012.ckpt" if name == "last.ckpt" else "last.ckpt")
    assert f"; {newest};" in out and checkpoint.peek(checkpoint.verify(newest)).step == 12
    code, _, err = lm("fit", "--config", "tiny.yaml", "--ckpt_path", "auto", "--trainer.max_steps", 14)
    assert code == 2 and f"{RUN / name} is in the way and was not written by lm: move it away" in err
    (RUN / name).rename("thesis")
    code, out, err = lm("fit", "--config", "tiny.yaml", "--ckpt_path", "auto", "--trainer.max_steps", 14)
    assert code == 0 and "done: step 14" in out and f"; {RUN / 'last.ckpt'};" in out, err


def test_where_every_name_is_taken_a_free_one_is_found(lm, workplace: Path) -> None:
    before = ("--trainer.callbacks", f"[{__name__}.Block]")
    code, out, err = lm("fit", "--config", "tiny.yaml", *before)
    assert code == 0 and f"; {RUN / 'step=0000012-3.ckpt'};" in out, err
    for taken, saved in (("step=0000010", "step=0000010-2"), ("last", "step=0000010-2"), ("best", "step=0000012-3")):
        text = f"note: {RUN / taken}.ckpt is in the way and was not written by lm: it is left alone, "
        assert sum(text in line for line in err.splitlines()) == 1, err
        assert taken == "best" or f"{text}{RUN / saved}.ckpt is saved instead" in err, err
    for name, step in (("step=0000010-2.ckpt", 10), ("step=0000012-3.ckpt", 12)):
        assert checkpoint.peek(checkpoint.verify(RUN / name)).step == step
    assert (RUN / "step=0000010.ckpt").is_fifo() and (RUN / "last.ckpt").is_symlink()


def test_a_folder_that_is_removed_is_made_again_and_it_is_said_once(lm, workplace: Path) -> None:
    code, out, err = lm("fit", "--config", "tiny.yaml", *callback("", 6, 9))
    assert code == 0 and f"; {RUN / 'last.ckpt'};" in out, err
    assert len(err.splitlines()) == 1 and f"note: {RUN} was removed while training went on: it is made again" in err
    assert checkpoint.peek(checkpoint.verify(RUN / "last.ckpt")).step == 12


def test_a_copy_whose_source_is_removed_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io, run = AtomicCheckpointIO(), tmp_path / "run"
    io.save_checkpoint(CONTENTS, run / "step=0000001.ckpt")
    io.writer.submit(lambda: shutil.rmtree(run))
    io.copy(run / "step=0000001.ckpt", run / "last.ckpt")
    io.writer.wait()
    checkpoint.verify(run / "last.ckpt")
    assert f"note: {run} was removed while training went on" in capsys.readouterr().err


def test_a_file_that_came_during_a_save_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(CONTENTS, tmp_path / "step=0000001.ckpt")
    io.writer.submit(lambda: (tmp_path / "last.ckpt").write_bytes(THESIS) and None)
    io.copy(tmp_path / "step=0000001.ckpt", tmp_path / "last.ckpt")
    io.writer.wait()
    assert (tmp_path / "last.ckpt").read_bytes() == THESIS
    assert "last.ckpt was not written by lm: it is left alone" in capsys.readouterr().err


@pytest.mark.parametrize("often", [1, 9])
def test_a_folder_that_is_removed_in_the_midst_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: int
) -> None:
    io, run, save, left = AtomicCheckpointIO(), tmp_path / "run", torch.save, [often]

    def removing(*arguments: object) -> None:
        save(*arguments)
        left[0] -= 1
        if left[0] >= 0:
            shutil.rmtree(run)

    monkeypatch.setattr(torch, "save", removing)
    io.save_checkpoint(CONTENTS, run / "last.ckpt")
    if often == 1:
        io.writer.wait()
        checkpoint.verify(run / "last.ckpt")
    else:
        with pytest.raises(checkpoint.UserError, match="could not be written: files of lm's were removed from"):
            io.writer.wait()


def test_a_file_where_the_folder_was_is_named(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    (tmp_path / "run").write_bytes(THESIS)
    io.save_checkpoint(CONTENTS, tmp_path / "run" / "last.ckpt")
    with pytest.raises(checkpoint.UserError, match="run is a file, no folder: move it away"):
        io.writer.wait()
    assert (tmp_path / "run").read_bytes() == THESIS
