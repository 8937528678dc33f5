"""Sharded over ranks: the same numbers, checkpoints whole or not at all, which any number of ranks can read."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lm.checkpoints import checkpoint, runs, sharded, sharded_tensors
from lm.errors import UserError
from lm.training.distributed.sharding import Sharded
from tests.support.ranks import finish, numbers, run, stop_at, write_recipe
from tests.support.runs import assert_equal, state

SHARDED = ("--trainer.strategy", "fsdp2")


def test_every_rank_comes_to_the_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # as for a process that the first has started
    strategy = Sharded()
    strategy.cluster_environment, strategy.parallel_devices = LightningEnvironment(), [torch.device("cpu")] * 2
    strategy._configure_launcher()
    assert strategy.launcher is not None


@pytest.mark.slow
def test_shards_and_whole_networks_train_and_resume_alike(lm, workplace: Path) -> None:
    write_recipe()  # Lightning refuses 64-true there
    exact = ("--model.init_args.net.init_args.dropout", 0)
    clipped = ("--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", 0.5)
    exact += (*clipped, "--model.init_args.optimizer.momentum", 0.9, "--model.init_args.clip_norm", 0.05)
    finish(run("whole", 2, *exact, cwd=workplace))
    finish(run("shards", 2, *exact, *SHARDED, cwd=workplace))
    assert numbers("shards") == pytest.approx(numbers("whole"), rel=2e-5)
    folder = Path("checkpoints/shards/step=0000005.ckpt")
    assert folder.is_dir() and checkpoint.damage(folder) is None and len(list(folder.glob("*.distcp"))) == 2
    finish(run("again", 2, *exact, *SHARDED, "--ckpt_path", folder, cwd=workplace))
    last = Path("checkpoints/shards/last.ckpt")
    assert_equal(state(last), state(Path("checkpoints/again/last.ckpt")))  # to the last bit

    # four sharded ranks and one, from what two have written; activations computed again
    for ranks in (1, 4):
        again = ("--model.init_args.activation_checkpointing", "true", "--ckpt_path", folder)
        finish(run(f"on-{ranks}", ranks, *exact, *SHARDED, *again, cwd=workplace))
        assert numbers(f"on-{ranks}")[-1] == pytest.approx(numbers("whole")[-1], rel=2e-5)

    # one rank, unsharded, from the folder; and two ranks, sharded, from a single file
    assert lm("fit", "--config", "tiny.yaml", "--name", "one", *exact, "--ckpt_path", folder)[0] == 0
    assert numbers("one")[-1] == pytest.approx(numbers("whole")[-1], rel=2e-5)
    single = ("--ckpt_path", "checkpoints/whole/step=0000005.ckpt")
    finish(run("from-file", 2, *exact, *SHARDED, *single, cwd=workplace))
    assert numbers("from-file")[-1] == pytest.approx(numbers("whole")[-1], rel=2e-5)
    whole = state(Path("checkpoints/whole/last.ckpt"))
    for name, tensor in state(last)["state_dict"].items():
        torch.testing.assert_close(tensor, whole["state_dict"][name], rtol=1e-3, atol=1e-6)
    code, out, _ = lm("validate", "--ckpt_path", last, "--config", "tiny.yaml", "--trainer.strategy", "auto")
    assert code == 0 and "val at step 12" in out
    assert lm("sample", "--ckpt_path", last, "--max_new_tokens", 5)[0] == 0

    assert lm("export", "--ckpt_path", last, "--format", "file", "--output", "one.ckpt")[0] == 0
    assert_equal(checkpoint.load(Path("one.ckpt")), checkpoint.load(last))
    finish(run("from-export", 2, *exact, *SHARDED, "--ckpt_path", "one.ckpt", "--trainer.max_steps", 13, cwd=workplace))
    assert checkpoint.peek(Path("checkpoints/from-export/last.ckpt")).step == 13
    for inside in ("lm.pt", "__0_0.distcp", ".metadata"):
        code, _, err = lm("sample", "--ckpt_path", last / inside)
        assert code == 2 and len(err.splitlines()) == 1 and f"is a part of the sharded checkpoint {last}" in err
    damaged(last)


def damaged(folder: Path) -> None:
    """Damage to any file is seen, the index runs no code, and a rename that was cut short is finished."""
    part = folder.with_name(f".{folder.name}.new.part")
    folder.rename(part)
    sharded.recover(folder.parent)
    assert folder.is_dir() and not part.exists()
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert checkpoint.damage(folder), file.name
        with pytest.raises(UserError, match=r"last\.ckpt"):
            checkpoint.load(folder)
        file.write_bytes(whole)
    assert checkpoint.damage(folder) is None
    (folder / "lm.pt").rename(folder / "lm.pt.away")
    notes: list[str] = []
    found = checkpoint.newest_first(folder.parent)
    assert runs.resolve(folder.parent, found, "auto", notes.append) == folder.parent / "best.ckpt"
    assert "last.ckpt is damaged" in notes[0]
    (folder / "lm.pt.away").rename(folder / "lm.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="no posix.system"):
        sharded_tensors.Reader(folder).read_metadata()


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_a_run_goes_on_in_the_other_kind_and_back(lm, workplace: Path) -> None:
    one = ("fit", "--config", "tiny.yaml", "--name", "both", "--ckpt_path", "auto", "--trainer.devices", 1)
    last, kinds = Path("checkpoints/both/last.ckpt"), []
    for steps, words in ((3, SHARDED), (6, ()), (9, SHARDED), (12, ())):
        code, _, err = lm(*one, *words, "--trainer.max_steps", steps)
        assert code == 0, err
        assert checkpoint.damage(last) is None and checkpoint.peek(last).step == steps
        kinds.append(last.is_dir())
    assert kinds == [True, False, True, False]
    assert not list(last.parent.glob(".*"))

    for name in ("a_file", "a_folder"):  # killed between the two renames
        whole = last if name == "a_file" else Path("checkpoints/both/step=0000005.ckpt")
        away = Path("checkpoints") / f".{name}.ckpt.old.part"
        whole.rename(away)
        sharded.recover(away.parent)
        assert checkpoint.damage(away.with_name(f"{name}.ckpt")) is None and not away.exists()


@pytest.mark.slow
def test_gradients_by_hand_are_sharded(workplace: Path) -> None:
    """Of an odd number of rows, of two micro-batches, of a tied head; and a run resumes to the same bits."""
    write_recipe(accumulate_grad_batches=2)
    exact = ("--model.init_args.net.init_args.dropout", 0, "--model.init_args.net.init_args.n_layer", 2)
    exact += ("--data.init_args.block_size", 15, "--model.init_args.clip_norm", "null")  # rows do not divide
    exact += ("--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.lr", 0.5)
    manual = ("--model", "lm.training.ManualLanguageModel", *exact)
    again = ("--model.init_args.activation_checkpointing", "true")
    finish(run("whole", 2, *exact, cwd=workplace))
    finish(run("by-hand", 2, *manual, *SHARDED, cwd=workplace))
    finish(run("recomputed", 2, *manual, *SHARDED, *again, cwd=workplace))
    assert numbers("by-hand") == pytest.approx(numbers("whole"), rel=2e-5)
    last = Path("checkpoints/by-hand/last.ckpt")
    recomputed = state(Path("checkpoints/recomputed/last.ckpt"))
    assert_equal(state(last)["state_dict"], recomputed["state_dict"])
    resumed = ("--ckpt_path", "checkpoints/by-hand/step=0000005.ckpt")
    finish(run("resumed", 2, *manual, *SHARDED, *resumed, cwd=workplace))
    assert_equal(state(last), state(Path("checkpoints/resumed/last.ckpt")))
    finish(run("by-autograd", 2, *exact, *SHARDED, *resumed, cwd=workplace))
    assert numbers("by-autograd")[-1] == pytest.approx(numbers("whole")[-1], rel=2e-5)


@pytest.mark.parametrize("words", [("audit_every", 2), ("compile", "true")])
def test_what_needs_the_whole_network_is_refused(lm, workplace: Path, words: tuple[str, object]) -> None:
    setting, value = words
    manual = ("--model", "lm.training.ManualLanguageModel", f"--model.init_args.{setting}", value)
    code, _, err = lm("fit", "--config", "tiny.yaml", *manual, *SHARDED)
    assert code == 2 and err.startswith(f"error: model.{setting} with trainer.strategy fsdp2")
    assert len(err.splitlines()) == 1


def test_a_sharded_save_waits_for_the_copies_of_the_one_before(workplace: Path) -> None:
    """Its last.ckpt must not be replaced by the copy, still under way, of an older one."""
    write_recipe()
    words = ("--trainer.callbacks+", "tests.support.stop.SlowCopies", *stop_at(7, 0))
    process = run("slow", 1, *SHARDED, *words, cwd=workplace)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 143, error
    assert checkpoint.peek(Path("checkpoints/slow/last.ckpt")).step == 7
    assert checkpoint.peek(Path("checkpoints/slow/step=0000005.ckpt")).step == 5


@pytest.mark.slow
def test_training_goes_on_while_shards_are_written(workplace: Path) -> None:
    write_recipe(val_check_interval=100)
    finish(run("whole", 2, *SHARDED, cwd=workplace))
    finish(run("later", 2, *SHARDED, "--trainer.callbacks+", "tests.support.stop.WriteLater", cwd=workplace))
    assert all(int(Path(f"later-{rank}").read_text()) >= 7 for rank in (0, 1))
    finish(run("again", 2, *SHARDED, "--ckpt_path", "checkpoints/later/step=0000005.ckpt", cwd=workplace))
    for name in ("later", "again"):  # what was written is what there was to save
        assert_equal(state(Path("checkpoints/whole/last.ckpt")), state(Path(f"checkpoints/{name}/last.ckpt")))


def test_a_disk_that_refuses_a_sharded_save_harms_no_earlier_one(workplace: Path) -> None:
    write_recipe(max_steps=60)
    folder = workplace / "checkpoints"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        process = run("full", 2, *SHARDED, cwd=workplace)
        _, error = process.communicate(timeout=90)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and "could not be written" in lines[0], error
        kept = [path for path in (folder / "full").iterdir() if path.suffix == ".ckpt"]
        assert kept and [checkpoint.damage(path) for path in kept] == [None] * len(kept)
    finally:
        subprocess.run(["umount", folder], check=True)
