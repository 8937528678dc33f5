"""Every recipe is parsed as it is, and trains for two steps at a size that a test can afford."""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import MISSING, REFERENCE, ROOT
from tests.support.cases import often
from tests.support.recipes import CONFIGS, NET, PREPARE, SMALL, one_of_a_kind


def test_there_are_recipes() -> None:
    names = {path.stem for path in (ROOT / "configs/names").glob("*")}
    assert {
        "mlp",
        "mlp-by-hand",
        "mlp-context8",
        "record",
        "rnn",
        "gru",
        "lstm",
        "bag-of-words",
        "gated-wavenet",
        "wavenet",
        "wavenet-large",
        "wavenet-per-position",
    } == names
    assert {
        "bigram",
        "finetune",
        "addition",
        "reverse",
        "llama",
        "one-head",
        "layernorm",
        "gpt2-124m",
        "gpt2-350m",
        "gpt2-774m",
        "gpt2-1558m",
        "quickstart",
        "shakespeare",
        "shakespeare-15-minutes",
        "shakespeare-cpu",
    } <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(
    "config", often(CONFIGS, one_of_a_kind), ids=lambda path: str(path.relative_to(ROOT / "configs"))
)
def test_recipe(lm, data_for, config: Path) -> None:
    recipe = yaml.safe_load(config.read_text())
    sizes = recipe["data"]["init_args"]
    text = recipe["data"]["class_path"] == "lm.data.TextData"
    words = ["fit", "--config", config, *data_for(recipe), "--trainer.max_steps", 2, "--trainer.accelerator", "cpu"]
    if "tokenizer" in sizes:  # logits of GPT-2's vocabulary, of a whole tenth of the text, would take minutes
        words += ["--data.init_args.val_fraction", 0.002]
    words += [
        "--trainer.precision",
        "32-true",
        "--samples.max_new_tokens",
        8,
        "--data.init_args.block_size",
        8 if text else sizes["block_size"],
    ]
    words += ["--data.init_args.batch_size", 2 * recipe["trainer"].get("accumulate_grad_batches", 1)]
    arguments = recipe["model"]["init_args"].get("net", {}).get("init_args", {})
    words += [word for name in SMALL.keys() & arguments.keys() for word in (f"{NET}.{name}", SMALL[name])]
    code, out, err = lm(*words)
    assert code == 0, err
    assert "step 2/2  val_loss" in out


COLUMNS = {  # of the real data sets, with the types that they have
    "openwebtext/plain_text": {"text": str},
    "fineweb-edu/sample/10BT": {
        **dict.fromkeys(("text", "id", "dump", "url", "file_path", "language"), str),
        "language_score": float,
        "token_count": int,
        "score": float,
        "int_score": int,
    },
}


@pytest.mark.parametrize("config", often(PREPARE, 2), ids=lambda path: path.stem)
def test_preparation(lm, workplace: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    if not MISSING:
        monkeypatch.setenv("LM_DATA_HOME", str(REFERENCE))
    tokenizer = "byte" if MISSING else "gpt2"
    for folder, columns in COLUMNS.items():
        (workplace / folder).mkdir(parents=True)
        for part in range(2):
            texts = [f"Document {part} {i}: " + "word " * (i % 30) for i in range(2000)]
            table = {
                name: texts if name == "text" else [kind(i) for i in range(2000)] for name, kind in columns.items()
            }
            pyarrow.parquet.write_table(pyarrow.table(table), workplace / folder / f"{part:03}.parquet")
    for name in ("texts/deep", "src/deep"):
        (workplace / name).mkdir(parents=True)
        for i in range(200):
            (workplace / name / f"{i}.{'txt' if 'texts' in name else 'py'}").write_text(f"print({i})\n" * (i % 9 + 9))
    code, out, err = lm("prepare", "--config", config, "--tokenizer", tokenizer, "--json")
    assert code == 0, err
    said, output = json.loads(out.splitlines()[-1]), yaml.safe_load(config.read_text())["output"]
    assert said["documents"] == (4000 if "web" in config.stem else 200)
    fit = ("--data.init_args.corpus", output, "--data.init_args.tokenizer", tokenizer, "--name", "run")
    short = ("--data.init_args.block_size", 8, "--trainer.max_steps", 2)
    code, _, err = lm("fit", "--config", "tiny.yaml", *short, *fit)
    assert code == 0, err
