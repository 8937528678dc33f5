"""What is said of a command line with a fault: one line that names the full key, the value and what to do."""

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import RECIPE

FIT = ("fit", "--config", "tiny.yaml", "--name", "new")
LR = "model.init_args.optimizer.init_args.lr"
NET = "model.init_args.net.init_args"
SAMPLE = ("sample", "--ckpt_path", "x.ckpt")
OPTIMIZER = ("--model.init_args.optimizer", "AdamW")
STARTS = {"--lr": "1", "--model.lr": "1", "--optimizer.lr": "1", "--model.init_args.lr": "1", "--trainer.lr": "1"}
FULL = {  # what is said, and the full name that is meant
    **dict.fromkeys((*STARTS, "--learning-rate", "--data.lr"), LR),
    **dict.fromkeys(("--n_layer", "--net.n_layer", "--data.n_layer", "--model.init_args.net.n_layr"), f"{NET}.n_layer"),
    **dict.fromkeys(("--batch_size", "--data.batch_sizes", "--trainer.batch_size"), "data.init_args.batch_size"),
    **dict.fromkeys(("--max_steps", "--max-steps", "--trainer.max-steps", "--epochs"), "trainer.max_steps"),
    "--temperature": "samples.temperature",
    "--devices": "trainer.devices",
    "--seed": "seed_everything",
    "--resume": "ckpt_path",
    "--figures.attension": "figures.attention",
    "--model.init_args.schedule.warmup_stepz": "model.init_args.schedule.init_args.warmup_steps",
}
ELSEWHERE = {"--split": "validate, test", "--gpu": "plan", "--text_key": "prepare, tokenizer", "--source": "prepare"}
WRONG = {  # an option as it is said, with a value that it cannot have
    "trainer.max_steps": "int",
    "model.optimizer.lr": "float",
    LR: "float",
    "model.net.n_layer": "int",
    f"{NET}.n_layer": "int",
    "data.batch_size": "int",
    "data.init_args.order": "'random' or 'permutation'",
    "model.init_args.schedule.init_args.warmup_steps": "int",
    "seed_everything": "bool or int",
    "watch.timeout": "float",
    "samples.seed": "int",
}
LINES = {
    "a class that needs more": (
        (*FIT, "--trainer.logger", "CSVLogger"),
        "trainer.logger CSVLogger: it needs save_dir: say --trainer.logger.init_args.save_dir VALUE",
    ),
    "a callback that needs more": (
        (*FIT, "--trainer.callbacks+=EarlyStopping"),
        "trainer.callbacks EarlyStopping: it needs monitor",
    ),
    "a class whose package is missing": (
        (*FIT, "--trainer.logger", "WandbLogger"),
        "trainer.logger WandbLogger: package wandb is not installed: pip install wandb",
    ),
    "a callback misspelt": (
        (*FIT, "--trainer.callbacks", "ModelChekpoint"),
        "did you mean lightning.pytorch.callbacks.ModelCheckpoint?",
    ),
    "a callback's setting misspelt": (
        (*FIT, "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.moniter", "x"),
        "did you mean trainer.callbacks.init_args.monitor?",
    ),
    "a checkpoint where only weights are taken": (
        ("gradients", *FIT[1:], "--ckpt_path", "x.ckpt"),
        "unknown option or key ckpt_path: did you mean init_from?",
    ),
    "a class by a part of its name": (
        (*FIT, "--model", "manual"),
        "model: found 'manual', no class that belongs there: did you mean lm.training.ManualLanguageModel?",
    ),
    "a part of a class's name that others end with": (
        (*FIT, "--model", "Policy"),
        "did you mean lm.posttraining.PolicyGradient?",
    ),
    "a network misspelt": ((*FIT, "--model.init_args.net", "GTP"), "did you mean lm.models.GPT?"),
    "a data module misspelt": ((*FIT, "--data", "TextDat"), "did you mean lm.data.TextData?"),
    "a text for a data module": (
        (*FIT, "--data", "text.txt"),
        "data: found 'text.txt', expected a class by its import path",
    ),
    "no GPU": ((*FIT, "--trainer.accelerator", "gpu"), "trainer.accelerator gpu: torch finds no GPU here: see lm doc"),
    "no such accelerator": ((*FIT, "--trainer.accelerator", "nope"), "trainer.accelerator nope: say auto, cpu"),
    "no such strategy": ((*FIT, "--trainer.strategy", "nope"), "trainer.strategy nope: say auto, ddp or fsdp2"),
    "no devices": ((*FIT, "--trainer.devices", "-3"), "trainer.devices: found '-3': say how many processes"),
    "no nodes": ((*FIT, "--trainer.num_nodes", "0"), "trainer.num_nodes"),
    "no such profiler": ((*FIT, "--trainer.profiler", "nope"), "trainer.profiler: say simple"),
    "no time": ((*FIT, "--trainer.max_time", "x"), "trainer.max_time is x: say DD:HH:MM:SS"),
    **{
        f"{option} {value}": (
            (*words, f"{option}={value}"),
            f"error: {shown} is {float(value)}: it must be a finite number",
        )
        for value in ("nan", "inf", "-inf")
        for words, option, shown in (
            (SAMPLE, "--temperature", "--temperature"),
            (SAMPLE, "--repetition_penalty", "--repetition_penalty"),
            (FIT, "--model.clip_norm", "model.clip_norm"),
            (FIT, "--trainer.gradient_clip_val", "trainer.gradient_clip_val"),
        )
    },
    "no number": ((*SAMPLE, "--temperature", "abc"), "error: --temperature: found 'abc', expected float"),
    "an int with a power": ((*FIT, "--trainer.max_steps", "1e3"), "found '1e3', expected int: write 1000"),
    "an int with a point": ((*SAMPLE, "--seed", "10.0"), "--seed: found '10.0', expected int: write 10"),
    "a section of a wrong kind": ((*FIT, "--trainer", "x"), "trainer: found 'x', expected a YAML mapping"),
    "a recipe without its option": (("fit", "configs/t.yaml"), "say --config configs/t.yaml"),
    "a recipe of gradients": (("gradients", "t.yaml"), "say --config t.yaml"),
    "a checkpoint without its option": (("sample", "x.ckpt"), "say --ckpt_path x.ckpt"),
    "a text without its option": (("prepare", "text.txt"), "say --source text.txt"),
    "a word too many": ((*FIT, "extra"), "extra: no option stands before it: see lm fit --help"),
    "a value missing": ((*FIT, "--data.init_args.corpus"), "--data.init_args.corpus: a value is missing behind it"),
    "a value missing in between": (("fit", "--config", "--name", "x"), "--config: a value is missing behind it"),
    "a value too many": ((*FIT, "--json=x"), "--json takes no value"),
    "a needed option missing": (("export", "--ckpt_path", "x"), "--output is missing: see lm export --help"),
    "one dash": ((*FIT, "-n", "x"), "unknown option -n: options begin with two dashes"),
    "misspelt for sample": ((*SAMPLE, "--temprature", 1), "did you mean temperature?"),
    "another program's word": ((*SAMPLE, "--max_tokens", 1), "did you mean max_new_tokens?"),
    "a config for sample": ((*SAMPLE, "--config", "x"), "it is an option of lm fit, validate"),
    "misspelt for import": (("import", "--src", "x"), "did you mean source?"),
    "a GPU of plan": (("plan", "--config", "tiny.yaml", "--gpus", "L4"), "did you mean gpu?"),
    "a folder as a config": (("fit", "--config", "folder"), "--config folder: it is a folder"),
    "a config that is no text": (("fit", "--config=binary"), "--config binary, line 2: byte 0x80 is not UTF-8"),
    "a config in Latin 1": (("prepare", "--config", "latin"), "--config latin, line 1: byte 0xe9 is not UTF-8"),
    "an empty config": (("plan", "--config", "empty"), "--config empty: the config is empty"),
    "a config of comments": (("fit", "--config", "comment"), "--config comment: the config is empty"),
    "a list as a config": (("prepare", "--config", "list"), "--config list, line 1: .* but a list"),
    "a tab in a config": (("fit", "--config", "tab"), "--config tab, line 2: it is indented by a tab"),
    "a colon too many": (("gradients", "--config", "colon"), "--config colon, line 1: "),
    "a key that is no key": (("fit", "--config", "tiny.yaml", "--config", "lr"), f"lr, line 1: .*did you mean {LR}?"),
    "a recipe for prepare": (("prepare", "--config", "tiny.yaml"), "tiny.yaml, line [0-9]+: unknown option or key"),
}


@pytest.fixture
def configs(workplace: Path) -> None:
    (workplace / "folder").mkdir()
    (workplace / "binary").write_bytes(bytes(range(256)))
    (workplace / "latin").write_bytes("name: café\n".encode("latin-1"))
    texts = {"empty": "", "comment": "# none\n", "list": "- a\n", "tab": "trainer:\n\tmax_steps: 3\n"}
    for name, text in (texts | {"colon": "name: a: b\n", "lr": "lr: 1\n"}).items():
        (workplace / name).write_text(text)


def refused(lm, *arguments: object) -> str:
    """The one line of a refusal."""
    code, out, err = lm(*arguments)
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"error: .{10,300}\n", err), err
    assert "Namespace" not in err and "<class" not in err and "Union" not in err
    if suggested := re.search(r"key (\S+): did you mean (\S+)\?", err):
        assert suggested[1] != suggested[2]
    return err


@pytest.mark.parametrize("option", FULL)
@pytest.mark.parametrize("joined", [False, True])
def test_a_suggestion_is_a_full_name(lm, workplace: Path, option: str, joined: bool) -> None:
    err = refused(lm, *FIT, *([f"{option}=1"] if joined else [option, 1]))
    assert f"unknown option or key {option[2:]}: did you mean {FULL[option]}?" in err


@pytest.mark.parametrize("option", ELSEWHERE)
def test_an_option_of_another_command(lm, workplace: Path, option: str) -> None:
    assert f"{option[2:]}: it is an option of lm {ELSEWHERE[option]}" in refused(lm, *FIT, option, "x")


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_named_by_its_full_key(lm, workplace: Path, key: str) -> None:
    assert f"error: {key}: found 'x', expected {WRONG[key]}" in refused(lm, *FIT, *OPTIMIZER, f"--{key}", "x")


@pytest.mark.parametrize("case", LINES)
def test_a_line(lm, configs: None, case: str) -> None:
    arguments, expected = LINES[case]
    err = refused(lm, *arguments)
    assert re.search(expected.replace("?", r"\?") if "[" in expected or ".*" in expected else re.escape(expected), err)


def test_a_value_without_end_is_cut(lm, workplace: Path) -> None:
    assert "found 'xxx" in refused(lm, *FIT, "--trainer.max_steps", "x" * 5000)
    assert "unknown option or key xxx" in refused(lm, *FIT, "--" + "x" * 5000, "1")


def test_a_key_in_a_recipe_is_named_with_its_line(lm, workplace: Path) -> None:
    text = yaml.safe_dump(RECIPE).replace("n_head", "n_heads")
    (workplace / "tiny.yaml").write_text(text)
    line = 1 + text[: text.index("n_heads")].count("\n")
    assert f"error: tiny.yaml, line {line}: unknown option or key {NET}.n_heads: did" in refused(lm, *FIT)
