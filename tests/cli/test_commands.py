"""Each command, as the contract has it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lm.cli import COMMANDS, main
from tests.conftest import ROOT, start

FIT = ("fit", "--config", "tiny.yaml")
LAST = ("--ckpt_path", "checkpoints/tiny/last.ckpt")


@pytest.fixture
def fitted(lm, workplace: Path) -> Path:
    """A workplace with a finished run."""
    assert lm(*FIT)[0] == 0
    return workplace


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = "import sys; from lm.cli import main; main(['--help']); print(*sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(f"\n  {name} " in out for name in COMMANDS)
    loaded = set(out.splitlines()[-1].split())
    assert not loaded & {"torch", "lightning", "numpy", "jsonargparse", "yaml"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help.all"])
    assert stop.value.code == 0
    others = {"doctor": "--lock", "exercises": "--check"} | dict.fromkeys(
        ("gradients", "plan", "inspect", "bench"), "--config"
    )
    others |= dict.fromkeys(("import", "prepare", "tokenizer"), "--source")
    others |= {"report": "--output", "sweep": "--config"}
    option = others.get(command, "--ckpt_path")
    assert option in capsys.readouterr().out


def test_the_documents_table_has_every_command_and_no_other() -> None:
    table = re.findall(r"^\| (`lm .*?) \|", (ROOT / "docs/usage.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`lm (\w+)`", " ".join(table))) == sorted(COMMANDS)


@pytest.mark.parametrize("command", ["fit", "gradients", "plan"])
@pytest.mark.parametrize(
    ("section", "slip", "meant"),
    [
        ("trainer", "val_chek_interval", "trainer.val_check_interval"),
        ("trainer", "max-steps", "trainer.max_steps"),
        ("samples", "max_new_token", "samples.max_new_tokens"),
    ],
)
def test_a_slip_in_a_recipe_is_found_by_all_that_read_one(
    lm, workplace: Path, command: str, section: str, slip: str, meant: str
) -> None:
    """Those that make no Trainer, too."""
    Path("slip.yaml").write_text(f"{section}:\n  {slip}: 4\n")
    code, _, err = lm(command, "--config", "tiny.yaml", "--config", "slip.yaml")
    assert code == 2
    assert err == f"error: slip.yaml, line 2: unknown option or key {section}.{slip}: did you mean {meant}?\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "lm 0.1.0\n"


def test_fit_prints_json_last_and_progress_elsewhere(lm, workplace: Path) -> None:
    code, out, err = lm(*FIT, "--json")
    result = json.loads(out)
    assert code == 0
    assert [*result] == ["step", "loss", "val_loss", "seconds", "tokens", "tokens_per_second", "ckpt_path"]
    assert (result["step"], result["tokens"], result["ckpt_path"]) == (12, 12 * 4 * 16, "checkpoints/tiny/last.ckpt")
    assert "step 12/12  loss" in err and "step 12/12  val_loss" in err


def test_fit_without_a_terminal_prints_lines_not_a_bar(lm, workplace: Path) -> None:
    out = lm(*FIT, "--trainer.log_every_n_steps", 5)[1]
    assert "\r" not in out
    assert [line.split()[1] for line in out.splitlines() if "  loss " in line] == ["1/12", "5/12", "10/12", "12/12"]


def test_fit_writes_the_run_folders(fitted: Path) -> None:
    names = sorted(path.name for path in (fitted / "checkpoints/tiny").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step=0000005.ckpt", "step=0000010.ckpt"]
    found = {path.name.split(".")[0] for path in (fitted / "logs/tiny").iterdir()}
    assert found == {"config", "metrics", "run", "events", "projector_config", "00012"}  # the last two: the embedding's
    assert main([*FIT, "--ckpt_path", "last", "--trainer.max_steps", "13"]) == 0
    assert yaml.safe_load((fitted / "logs/tiny/config-2.yaml").read_text())["trainer"]["max_steps"] == 13


def test_best_is_the_lowest_validation_loss(lm, workplace: Path) -> None:
    # a learning rate that ruins the network after the first evaluation
    ruin = ["--model.init_args.schedule", "lm.training.schedules.Step", "--model.init_args.schedule.milestones", "[4]"]
    lm(*FIT, *ruin, "--model.init_args.schedule.factor", "300", "--model.init_args.schedule.warmup_steps", 0)
    best, last = (torch.load(f"checkpoints/tiny/{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (4, 12)
    assert best["lm"]["validation"]["loss"] < last["lm"]["validation"]["loss"]


def test_the_resolved_config_trains_the_same(lm, fitted: Path) -> None:
    shutil.copy("logs/tiny/config.yaml", "again.yaml")
    assert lm("fit", "--config", "again.yaml", "--name", "again")[0] == 0
    ours, theirs = (torch.load(f"checkpoints/{run}/last.ckpt", weights_only=True) for run in ("tiny", "again"))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def test_print_config_is_a_config(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["net"]["init_args"]["n_embd"] == 16
    assert printed["data"]["init_args"]["val_fraction"] == 0.1


def test_overrides_reach_their_place(lm, workplace: Path) -> None:
    lm(*FIT, "--name", "other", "--model.init_args.net", "lm.models.Bigram", "--data.init_args.block_size", 8)
    saved = torch.load("checkpoints/other/last.ckpt", weights_only=True)
    assert [*saved["state_dict"]] == ["net.table.weight"]
    assert saved["lm"]["block_size"] == 8


@pytest.mark.parametrize(("split", "share"), [("val", 0.1), ("train", 0.9)])
def test_validate_covers_the_split(lm, fitted: Path, split: str, share: float) -> None:
    code, out, _ = lm("validate", *LAST, "--split", split, "--json")
    result = json.loads(out)
    assert code == 0
    assert [*result] == ["loss", "perplexity", "bits_per_byte", "tokens", "step"]
    size = len((fitted / "text.txt").read_text())
    border = int(size * 0.9)
    assert result["tokens"] == (border if split == "train" else size - border) - 1
    if split == "val":
        assert result["loss"] == torch.load(LAST[1], weights_only=True)["lm"]["validation"]["loss"]


def test_test_says_that_validation_stands_in(lm, fitted: Path) -> None:
    code, out, err = lm("test", *LAST, "--json")
    assert code == 0
    assert "no test split" in err
    assert json.loads(out) == json.loads(lm("validate", *LAST, "--json")[1])
    other = lm("test", *LAST, "--data.init_args.test_fraction", 0.3, "--json")
    assert json.loads(other[1])["tokens"] > json.loads(out)["tokens"]
    assert "no test split" not in other[2]


def test_a_checkpoint_needs_neither_config_nor_corpus(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(fitted / "checkpoints/tiny/best.ckpt", elsewhere)
    assert torch.load(elsewhere / "best.ckpt", weights_only=True)["lm"]["tokenizer"]["kind"] == "char"
    words = ("sample", "--ckpt_path", "best.ckpt", "--prompt", "times", "--max_new_tokens", 40, "--json")
    process = start(*words, cwd=elsewhere)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(json.loads(out.splitlines()[-1])["text"][0]) == 45


def test_sample(lm, fitted: Path) -> None:
    code, out, err = lm("sample", *LAST, "--max_new_tokens", 30, "--num_samples", 3, "--prompt", "1 times ", "--json")
    result = json.loads(out)
    assert code == 0
    assert [*result] == ["text", "tokens", "seconds", "tokens_per_second"]
    assert result["tokens"] == 90
    assert len(set(result["text"])) == 3 and all(
        len(text) == 38 and text.startswith("1 times ") for text in result["text"]
    )
    assert all(text in err for text in result["text"])
    again = lm("sample", *LAST, "--max_new_tokens", 30, "--num_samples", 3, "--prompt", "1 times ")[1]
    assert again == "\n---\n".join(result["text"]) + "\n"
    other = lm("sample", *LAST, "--max_new_tokens", 30, "--num_samples", 3, "--prompt", "1 times ", "--seed", 2)[1]
    assert other != again
    result["text"].append("gone")
    Path("known.txt").write_text("\n".join(line for text in result["text"][1:] for line in text.splitlines()))
    words = ("sample", *LAST, "--max_new_tokens", 30, "--num_samples", 3, "--prompt", "1 times ")
    code, out, err = lm(*words, "--compare", "known.txt", "--json")
    compared = json.loads(out.splitlines()[-1])
    assert f"{compared['known']} of {compared['lines']} lines stand in known.txt" in err
    lines = [line.strip() for text in result["text"][:3] for line in text.splitlines() if line.strip()]
    known = {line.strip() for text in result["text"][1:] for line in text.splitlines()}
    assert (compared["lines"], compared["known"]) == (len(lines), sum(line in known for line in lines))


def test_a_draft_changes_no_greedy_text(lm, fitted: Path) -> None:
    words = ("sample", *LAST, "--max_new_tokens", 60, "--temperature", 0, "--prompt", "1 times ", "--json")
    plain = json.loads(lm(*words)[1])["text"]
    for draft in ("repetition", "checkpoints/tiny/best.ckpt"):
        assert json.loads(lm(*words, "--draft", draft)[1])["text"] == plain
    code, out, _ = lm(*words[:-1], "--stop", plain[0][20:22], "--draft", "repetition")
    assert code == 0 and plain[0].startswith(out.rstrip("\n")) and len(out) < 30


def test_sample_stops_at_any_of_its_strings(lm, fitted: Path) -> None:
    words = ("sample", *LAST, "--max_new_tokens", 400, "--prompt", "2", "--json")
    free = json.loads(lm(*words)[1])["text"][0][1:]
    a, b = free[30:32], free[50:53]
    stopped = json.loads(lm(*words, "--stop", a, "--stop", b)[1])["text"][0][1:]
    assert stopped == free[: min(free.find(a), free.find(b))]


def test_sample_reads_a_prompt_file(lm, fitted: Path) -> None:
    prompt = (fitted / "text.txt").read_text()[:500]  # longer than the context
    (fitted / "prompt.txt").write_text(prompt)
    code, out, _ = lm("sample", *LAST, "--prompt_file", "prompt.txt", "--max_new_tokens", 5)
    assert code == 0
    assert out.startswith(prompt) and len(out) == 506


def test_samples_and_metrics_are_in_tensorboard(fitted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("logs/tiny").Reload()
    tags = board.Tags()
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "train/tokens_per_second", "val/loss"} <= {
        *tags["scalars"]
    }
    assert [event.step for event in board.Scalars("train/loss")] == [*range(1, 13)]
    assert [event.step for event in board.Scalars("val/loss")] == [4, 8, 12]
    assert [event.step for event in board.Tensors("sample/text_summary")] == [4, 8, 12]


def test_validate_takes_a_recipe(lm, fitted: Path) -> None:
    """A recipe has checkpoint and samples sections too, which do not concern an evaluation."""
    code, out, err = lm("validate", *LAST, "--config", "tiny.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] == torch.load(LAST[1], weights_only=True)["lm"]["validation"]["loss"]


def test_sanity_validation_is_not_logged(lm, workplace: Path) -> None:
    lm(*FIT, "--trainer.num_sanity_val_steps", 1, "--trainer.log_every_n_steps", 0)
    steps = [line.split(",")[0] for line in (workplace / "logs/tiny/metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["1", "4", "8", "12"]
