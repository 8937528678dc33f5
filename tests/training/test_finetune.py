from pathlib import Path

import pytest
import torch

from lm.training import checkpoint
from lm.training.loggers import read_csv

RECIPE = ["fit", "--config", "tiny.yaml"]
LAST = "checkpoints/tiny/last.ckpt"
NET = "--model.init_args.net.init_args"


@pytest.fixture
def pretrained(lm, workplace: Path) -> Path:
    assert lm(*RECIPE)[0] == 0
    (workplace / "shorter.txt").write_text((workplace / "text.txt").read_text().replace("x", "")[4000:])
    return workplace / LAST


def test_a_new_run_begins_with_the_weights_and_nothing_else(lm, pretrained: Path) -> None:
    """Without a learning rate the weights stay, step and optimizer are new."""
    still = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0]
    assert lm(*RECIPE, "--name", "tuned", "--init_from", LAST, "--trainer.max_steps", 4, *still)[0] == 0
    before, after = checkpoint.load(pretrained), checkpoint.load(Path("checkpoints/tuned/last.ckpt"))
    assert after["global_step"] == 4
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())
    steps = {float(state["step"]) for state in after["optimizer_states"][0]["state"].values()}
    assert steps == {4.0}
    assert [row["step"] for row in read_csv(Path("logs/tuned/metrics.csv"))[1]] == ["1", "2", "3", "4"]


def test_it_resumes_as_any_run(lm, pretrained: Path) -> None:
    words = [*RECIPE, "--name", "tuned", "--init_from", LAST, "--ckpt_path", "auto"]
    assert lm(*words, "--trainer.max_steps", 4)[0] == 0
    assert lm(*words, "--trainer.max_steps", 6)[0] == 0
    assert checkpoint.peek(Path("checkpoints/tuned/last.ckpt"))["step"] == 6


def test_another_vocabulary_is_refused_by_name_or_inherited(lm, pretrained: Path) -> None:
    words = [*RECIPE, "--name", "tuned", "--init_from", LAST, "--data.init_args.corpus", "shorter.txt"]
    code, _, err = lm(*words)
    assert code == 2
    assert "--init_from checkpoints/tiny/last.ckpt has another vocabulary: char of " in err and err.count("\n") == 1
    assert lm(*words, "--data.init_args.tokenizer", "inherit")[0] == 0
    tokenizers = [checkpoint.peek(Path(f"checkpoints/{run}/last.ckpt"))["tokenizer"] for run in ("tiny", "tuned")]
    assert tokenizers[0] == tokenizers[1]
    words += ["--data.init_args.tokenizer", "inherit", "--ckpt_path", "last", "--trainer.max_steps", 14]
    assert lm(*words)[0] == 0
    assert lm("validate", "--ckpt_path", "checkpoints/tuned/last.ckpt")[0] == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([f"{NET}.n_embd", 32], r"is of another shape: net.wte.weight is (41, 16) there and (41, 32) in this"),
        ([f"{NET}.n_layer", 2], "net.h.1.ln_1.weight is missing there"),
        (["--data.init_args.block_size", 8], "net.wpe.weight is (16, 16) there and (8, 16)"),
        (["--init_from", "nowhere.ckpt"], "checkpoint nowhere.ckpt: there is no such file"),
    ],
)
def test_other_shapes_and_missing_files(lm, pretrained: Path, extra: list, message: str) -> None:
    code, _, err = lm(*RECIPE, "--name", "tuned", "--init_from", LAST, *extra)
    assert code == 2
    if "wte" in message:
        symbols = torch.load(pretrained, weights_only=True)["state_dict"]["net.wte.weight"].shape[0]
        message = message.replace("41", str(symbols))
    assert message in err, err
    assert err.count("\n") == 1


def test_inherit_needs_a_checkpoint(lm, workplace: Path) -> None:
    code, _, err = lm(*RECIPE, "--data.init_args.tokenizer", "inherit")
    assert code == 2
    assert "data.tokenizer inherit takes the tokenizer of a checkpoint: say which with --init_from" in err
