"""Writing in the background: training waits for the copy alone, and nothing is lost or written twice."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.checkpoints.background import BackgroundWriter
from lm.errors import UserError
from lm.training.checkpoint_io import AtomicCheckpointIO
from tests.support.samples import CONTENTS


def contents() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    return {"tied": [weight, weight], "step": torch.tensor(3), "plain": {"a": 1}, "empty": torch.empty(0)}


def test_a_snapshot_does_not_change_with_the_state_and_shares_what_was_shared() -> None:
    writer, state = BackgroundWriter(), contents()
    copy = writer.snapshot(state)
    state["tied"][0].zero_()
    assert copy["tied"][0] is copy["tied"][1] and torch.equal(copy["tied"][0], torch.arange(6.0).view(2, 3))
    assert copy["plain"] == {"a": 1} and copy["step"] == 3 and copy["empty"].shape == (0,)
    again = writer.snapshot(state)
    assert again["tied"][0].data_ptr() == copy["tied"][0].data_ptr()  # the memory is used again
    assert writer.snapshot({"tied": [torch.ones(7)]})["tied"][0].shape == (7,)


def test_training_goes_on_while_a_file_is_written_and_none_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, may_write, writing = AtomicCheckpointIO(), threading.Event(), []
    save = torch.save

    def slow(values: Any, file: Any) -> None:
        writing.append(file)
        assert len(writing) == 1
        assert may_write.wait(30)
        save(values, file)
        writing.pop()

    monkeypatch.setattr(torch, "save", slow)
    state = CONTENTS | contents()
    io.save_checkpoint(state, tmp_path / "a.ckpt")  # returns, though it may not write yet
    state["tied"][0] += 100  # the next step
    io.writer.check()
    assert not (tmp_path / "a.ckpt").exists()
    second = threading.Thread(target=io.save_checkpoint, args=(state, tmp_path / "a.ckpt"))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # waits for the first
    io.writer.submit(lambda: (tmp_path / "order").write_text(str((tmp_path / "a.ckpt").exists())))
    may_write.set()
    second.join()
    io.writer.wait()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["tied"][0][0, 0] == 100
    assert (tmp_path / "order").read_text() == "True"
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_a_refusal_of_the_disk_is_raised_where_training_asks(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    (tmp_path / "file").write_text("")
    io.save_checkpoint(contents(), tmp_path / "file" / "a.ckpt")
    with pytest.raises((UserError, OSError)):
        io.writer.wait()
    io.writer.check()  # once


def test_which_checkpoints_are_kept(lm, workplace: Path) -> None:
    words = ("--checkpoint.every_n_steps", 2, "--checkpoint.keep_last", 2, "--checkpoint.keep_every", 4)
    assert lm("fit", "--config", "tiny.yaml", *words)[0] == 0
    kept = sorted(path.stem for path in Path("checkpoints/tiny").glob("step=*"))
    assert kept == [f"step={step:07d}" for step in (4, 8, 10, 12)]
    code, _, err = lm("fit", "--config", "tiny.yaml", "--name", "other", "--checkpoint.keep_every", 0)
    assert code == 2 and "checkpoint.keep_every is 0" in err


def test_after_a_job_that_fails_none_that_was_to_follow_is_done() -> None:
    writer, done = BackgroundWriter(), []

    def fail() -> None:
        raise UserError("the disk refuses")

    writer.submit(fail)
    writer.submit(lambda: done.append("a copy of what was not written"))
    with pytest.raises(UserError, match="the disk refuses"):
        writer.wait()
    writer.submit(lambda: done.append("the next save"))
    writer.wait()
    assert done == ["the next save"]
