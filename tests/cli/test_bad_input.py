"""The table of bad input: each is exit code 2, one line that says what was found, and nothing harmed."""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import RECIPE, start

FIT = ("fit", "--config", "tiny.yaml", "--name", "new")
SAMPLE = ("sample", "--ckpt_path", "checkpoints/tiny/last.ckpt")
NET = "--model.init_args.net.init_args"

SUMS = ("fit", "--model.init_args.net", "lm.models.GPT", "--data", "lm.data.ArithmeticData", "--trainer.max_steps", 2)
LINES = ("fit", "--model.init_args.net", "lm.models.MLP", "--data", "lm.data.LinesData", "--trainer.max_steps", 2)
TABLE = {
    "no command": ((), "no command"),
    "unknown command": (("fti",), "unknown command fti: did you mean fit?"),
    "unknown option": ((*FIT, "--trainer.max_stepz", 3), "trainer.max_stepz: did you mean trainer.max_steps?"),
    "abbreviated option": ((*FIT, "--trainer.max_step", 3), "trainer.max_step: did you mean trainer.max_steps?"),
    "unknown argument of the network": (
        (*FIT, f"{NET}.n_headd", 2),
        f"did you mean {NET[2:]}.n_head?",
    ),
    "unknown option of sample": ((*SAMPLE, "--temprature", 1), "temprature: did you mean temperature?"),
    "unknown YAML key": (
        ("fit", "--config", "key.yaml"),
        "batch_sise: did you mean data.init_args.batch_size?",
    ),
    "unknown YAML section": (
        ("fit", "--config", "section.yaml"),
        "trainr.accelerator: did you mean trainer.a",
    ),
    "unknown class": (
        (*FIT, "--model.init_args.net", "lm.models.GTP"),
        "class_path lm.models.GTP: no such class: did you mean lm.models.GPT?",
    ),
    "class that runs code": ((*FIT, "--model.init_args.net", "os.system"), "class_path os.system: it is not allowed"),
    "function that runs code": (
        (*FIT, "--trainer.callbacks+", "subprocess.Popen"),
        "class_path subprocess.Popen: it is",
    ),
    "unknown module": ((*FIT, "--data", "nowhere.Data"), "there is no module nowhere"),
    "wrong type": ((*FIT, "--trainer.max_steps", "many"), "trainer.max_steps: found 'many', expected int"),
    "wrong type, deep": ((*FIT, f"{NET}.n_head", "two"), "n_head: found 'two', expected int"),
    "wrong choice": ((*FIT, "--trainer.precision", "8"), "trainer.precision: found '8', expected"),
    "empty source": (("prepare", "--source", "", "--tokenizer", "byte", "--output", "new"), "source '': it is empty"),
    "corpus without a name": ((*FIT, "--data.init_args.corpus", ""), "--data.init_args.corpus '': it is empty"),
    "empty checkpoint": ((*FIT, "--ckpt_path", ""), "--ckpt_path '': it is empty"),
    "name of 5000 letters": ((*FIT[:-1], "x" * 5000), "it has 5000 bytes: say at most 200"),
    "path of 5000 letters": ((*FIT, "--init_from", "x" * 5000), "--init_from xxx"),
    "value that begins with a dash": ((*FIT[:-1], "-x"), "--name: a value is missing behind it: say --name=-x"),
    "more weights than memory": ((*FIT, f"{NET}.n_embd", 10**8), "GB of memory are free here"),
    "missing config": (("fit", "--config", "none.yaml"), "--config none.yaml: No such file"),
    "empty config": (("fit", "--config", "empty"), "--config empty: the config is empty"),
    "torn config": (("fit", "--config", "torn.yaml"), "--config torn.yaml, line 1: the config is no YAML mapping"),
    "no steps": ((*FIT, "--trainer.max_steps", -1), "trainer.max_steps is -1"),
    "negative learning rate": (
        (*FIT, "--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.lr", -1),
        "model.optimizer.lr is -1: it must be at least 0",
    ),
    "no evaluation interval": ((*FIT, "--trainer.val_check_interval", 0), "trainer.val_check_interval is 0"),
    "no accumulation": ((*FIT, "--trainer.accumulate_grad_batches", 0), "trainer.accumulate_grad_batches is 0"),
    "part of the batches": ((*FIT, "--trainer.limit_train_batches", 7), "trainer.limit_train_batches: training has no"),
    "a draft for several": ((*SAMPLE, "--draft", "repetition", "--num_samples", 2), "--draft with --num_samples 2: it"),
    "a run's folder": (("sample", "--ckpt_path", "checkpoints/tiny"), "it is a run's folder: name one in it, such as"),
    "a tokenizer's file that is missing": (
        (*FIT, "--data.tokenizer", "no.tiktoken"),
        "no.tiktoken: there is no such file",
    ),
    "a draft that is missing": ((*SAMPLE, "--draft", "no.ckpt"), "checkpoint no.ckpt: there is no such file"),
    "sample prompt": ((*FIT, "--samples.prompt", "☃"), "--samples.prompt: the vocabulary of .* lacks"),
    "JSON without text": (
        (*FIT, "--data.init_args.corpus", "five.jsonl"),
        "five.jsonl, line 2: expected a JSON object",
    ),
    "tensor": (("sample", "--ckpt_path", "harm/tensor.ckpt"), "harm/tensor.ckpt: it is no checkpoint of lm"),
    "half a checkpoint": (("validate", "--ckpt_path", "harm/half.ckpt"), "harm/half.ckpt: it is no checkpoint of lm"),
    "network that is gone": (("sample", "--ckpt_path", "harm/gone.ckpt"), "the network nowhere.Net cannot be made"),
    "seed too large": ((*SAMPLE, "--seed", 10**30), "--seed is 1000000000000000000000000000000: it must be at least"),
    "device without memory": ((*SAMPLE, "--device", "meta"), "--device meta"),
    "part of an epoch": ((*FIT, "--trainer.val_check_interval", 0.5), "val_check_interval"),
    "epochs": ((*FIT, "--trainer.max_epochs", 3), "trainer.max_epochs is 3: training has no epochs"),
    "name with a slash": (("fit", "--config", "tiny.yaml", "--name", "../x"), "--name ../x: use letters"),
    "heads do not divide": ((*FIT, f"{NET}.n_head", 3), "n_head 3 does not divide n_embd 16"),
    "batch does not divide": (
        (*FIT, "--trainer.accumulate_grad_batches", 3),
        "data.batch_size 4 is not divisible by 1 processes x 3 accumulated batches = 3",
    ),
    "no such accelerator": ((*FIT, "--trainer.accelerator", "cuda"), "trainer.accelerator cuda: there is none that"),
    "missing corpus": ((*FIT, "--data.init_args.corpus", "no.txt"), "corpus no.txt: no such file or folder"),
    "empty corpus": ((*FIT, "--data.init_args.corpus", "empty"), "corpus empty: it is empty"),
    "empty folder": (
        (*FIT, "--data.init_args.corpus", "folder"),
        "source folder: no file matches (.jsonl, .ndjson, .parquet, .txt, .md)",
    ),
    "short corpus": (
        (*FIT, "--data.init_args.corpus", "short.txt"),
        "train split has 9 tokens, block_size 16 needs 17",
    ),
    "not UTF-8": ((*FIT, "--data.init_args.corpus", "latin.txt"), "latin.txt: not UTF-8: byte 0xe9 at offset 103"),
    "unknown tokenizer": ((*FIT, "--data.init_args.tokenizer", "bpe"), "tokenizer bpe: neither char, byte, gpt2"),
    "run has checkpoints": (
        ("fit", "--config", "tiny.yaml"),
        "checkpoints/tiny has checkpoints already: say",
    ),
    "last of nothing": ((*FIT, "--ckpt_path", "last"), "checkpoints/new has no checkpoint"),
    "missing checkpoint": ((*FIT, "--ckpt_path", "no.ckpt"), "checkpoint no.ckpt: there is no such file"),
    "truncated checkpoint": ((*FIT, "--ckpt_path", "harm/short.ckpt"), "harm/short.ckpt: it is truncated"),
    "flipped bit": ((*FIT, "--ckpt_path", "harm/flipped.ckpt"), "harm/flipped.ckpt: its record .* does not match"),
    "foreign checkpoint": ((*FIT, "--ckpt_path", "text.txt"), "text.txt: it is truncated or not a checkpoint"),
    "another width": (
        (*FIT, "--ckpt_path", SAMPLE[2], f"{NET}.n_embd", 32),
        "last.ckpt is of another architecture: n_embd is 16 there and 32 in this configuration",
    ),
    "another network": (
        (*FIT, "--ckpt_path", SAMPLE[2], "--model.init_args.net", "lm.models.Bigram"),
        "another architecture: class_path is lm.models.GPT there and lm.models.Bigram in this",
    ),
    "another number of heads": (
        (*FIT, "--ckpt_path", SAMPLE[2], f"{NET}.n_head", 4),
        "last.ckpt is of another architecture: n_head is 2 there and 4 in",
    ),
    "evaluate with another number of heads": (
        ("validate", "--ckpt_path", SAMPLE[2], f"{NET}.n_head", 4),
        "last.ckpt is of another architecture: n_head is 2 there and 4 in",
    ),
    "another optimizer": (
        (*FIT, "--ckpt_path", SAMPLE[2], "--model.init_args.optimizer", "torch.optim.SGD"),
        "last.ckpt has the state of torch.optim.AdamW, the recipe says torch.optim.SGD",
    ),
    "another vocabulary": (
        (*FIT, "--ckpt_path", SAMPLE[2], "--data.init_args.corpus", "upper.txt"),
        "last.ckpt has another tokenizer than data.corpus and data.tokenizer give",
    ),
    "evaluate a foreign corpus": (
        ("validate", "--ckpt_path", SAMPLE[2], "--data.init_args.corpus", "greek.txt"),
        "characters lacks 'α', 'β'",
    ),
    "evaluate nothing": (("validate",), "--ckpt_path is missing"),
    "unknown split": (("validate", *SAMPLE[1:], "--split", "dev"), "split: found 'dev', expected 'val' or 'test'"),
    "sample nothing": (("sample",), "ckpt_path"),
    "sample a missing file": (("sample", "--ckpt_path", "no.ckpt"), "checkpoint no.ckpt: there is no such file"),
    "unknown symbols": ((*SAMPLE, "--prompt", "1€2"), "--prompt: the vocabulary of .* lacks '€'"),
    "prompt not UTF-8": ((*SAMPLE, "--prompt_file", "latin.txt"), "latin.txt: not UTF-8 at byte offset 103"),
    "missing prompt file": ((*SAMPLE, "--prompt_file", "no.txt"), "--prompt_file no.txt: No such file"),
    "prompt file of other symbols": ((*SAMPLE, "--prompt_file", "tiny.yaml"), "--prompt_file: the vocabulary"),
    "two prompts": ((*SAMPLE, "--prompt", "a", "--prompt_file", "text.txt"), "say one of them"),
    "no tokens": ((*SAMPLE, "--max_new_tokens", 0), "--max_new_tokens is 0: it must be at least 1"),
    "bad top_p": ((*SAMPLE, "--top_p", 2), "--top_p is 2: it must be above 0 and at most 1"),
    "empty stop": ((*SAMPLE, "--stop", ""), "an empty string"),
    "no recipe and no network": (("fit",), "no network is said: give a recipe, --config configs/quickstart.yaml"),
    "context no power of n": (
        (*FIT, "--model.init_args.net", "lm.models.WaveNet", "--data.init_args.block_size", 12),
        "model.net: block_size 12 is not a power of fuse 2: use 16",
    ),
    "unknown operator": (
        (*SUMS, "--data.init_args.operators", "%"),
        "data.operators: unknown operator '%': say some of +-*/",
    ),
    "too many digits": (
        (*SUMS, "--data.init_args.digits", 6),
        "data.block_size 16 does not hold 999999+999999=8999991 and a mark: it needs 22",
    ),
    "no lines": ((*LINES, "--data.init_args.corpus", "empty"), "corpus empty: it has no lines"),
    "one line again and again": (
        (*LINES, "--data.init_args.corpus", "same.txt"),
        "corpus same.txt: its 50 lines are 1 different one(s)",
    ),
    "a symbol outside the vocabulary": (
        ("validate", *SAMPLE[1:], "--data.init_args.corpus", "greek.txt"),
        "characters lacks 'α', 'β'",
    ),
    "a batch of one for BatchNorm": (
        (*LINES, "--data.init_args.corpus", "text.txt", "--data.init_args.end", "|", "--data.init_args.batch_size", 1),
        "data.batch_size: BatchNorm in training mode needs at least 2 examples",
    ),
    "all targets for a fixed context": (
        (*LINES, "--data.init_args.corpus", "words.txt", "--data.init_args.targets", "all"),
        "model.net MLP gives logits (32, 27), the data has targets (32, 8): fixed contexts need",
    ),
    "nothing to inherit from": (
        (*FIT, "--data.init_args.tokenizer", "inherit"),
        "data.tokenizer inherit takes the tokenizer of a checkpoint: say which with --init_from",
    ),
    **{
        f"no device {name}": ((*SAMPLE, "--device", name), f"--device {name}: there is none here: say auto or cpu")
        for name in ("gpu9", "hpu", "mkldnn", "xla", "privateuseone", "cuda:99", "cpu:5", "")
    },
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("template")


@pytest.fixture
def harmed(lm, workplace: Path, template: Path) -> Path:
    """A workplace with a finished run and all the bad files of the table; the run is trained once."""
    if not (template / "checkpoints").exists():
        assert lm("fit", "--config", "tiny.yaml")[0] == 0
        subprocess.run(["cp", "-r", "checkpoints", str(template)], check=True)
    subprocess.run(["cp", "-r", str(template / "checkpoints"), "."], check=True)
    text = (workplace / "text.txt").read_text()
    (workplace / "upper.txt").write_text(text.replace("x", "X"))
    (workplace / "greek.txt").write_text("αβ " * 300)
    (workplace / "empty").write_text("")
    words = ["".join(chr(97 + (7 * i + j) % 26) for j in range(4)) for i in range(100)]
    (workplace / "words.txt").write_text("\n".join(words))
    (workplace / "same.txt").write_text("emma\n" * 50)
    (workplace / "folder").mkdir()
    (workplace / "short.txt").write_text("ten chars!")
    (workplace / "latin.txt").write_bytes(b"r" * 103 + b"\xe9sum\xe9" * 99)
    (workplace / "torn.yaml").write_text("trainer: [")
    recipe = yaml.safe_dump(RECIPE)
    (workplace / "key.yaml").write_text(recipe.replace("batch_size", "batch_sise"))
    (workplace / "section.yaml").write_text(recipe.replace("trainer:", "trainr:"))
    whole = (workplace / SAMPLE[2]).read_bytes()
    (workplace / "harm").mkdir()
    (workplace / "five.jsonl").write_text('{"text": "5"}\n{"text": 5}\n')
    torch.save(torch.zeros(3), workplace / "harm/tensor.ckpt")
    torch.save({"lm": {"config": {"name": "x"}}, "global_step": 1}, workplace / "harm/half.ckpt")
    gone = torch.load(SAMPLE[2], weights_only=True)
    gone["lm"]["config"]["model"]["init_args"]["net"]["class_path"] = "nowhere.Net"
    torch.save(gone, workplace / "harm/gone.ckpt")
    (workplace / "harm/short.ckpt").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (workplace / "harm/flipped.ckpt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    return workplace


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(lm, harmed: Path, case: str) -> None:
    arguments, expected = TABLE[case]
    before = digests(harmed / "checkpoints")
    code, out, err = lm(*arguments)
    line = err.splitlines()[-1]
    assert code == 2, err
    assert line.startswith("error: ")
    assert re.search(expected if "\\" in expected or ".*" in expected else re.escape(expected), line), line
    assert "Traceback" not in out + err
    assert case == "no command" or err.count("\n") == 1, err
    assert {p: d for p, d in digests(harmed / "checkpoints").items() if p in before} == before


@pytest.mark.parametrize("size", ["16k", "48k"])
def test_a_disk_that_fills_up(lm, workplace: Path, size: str) -> None:
    """Real small file systems: one full before training, one that fills while it goes on."""
    place = "checkpoints"
    folder = workplace / place
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        long = ("--trainer.max_steps", 2000, "--trainer.log_every_n_steps", 1, "--checkpoint.every_n_steps", 5)
        process = start("fit", "--config", "tiny.yaml", *long, cwd=workplace)
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 2, err
        assert re.fullmatch(rf"error: .*{place}/tiny.* \(No space left on device\): .* MiB free.*\n", err), err
        kept = list((workplace / "checkpoints/tiny").glob("*"))
        assert all(path.suffix == ".ckpt" for path in kept)
        assert all(lm("sample", "--ckpt_path", path, "--max_new_tokens", 2)[0] == 0 for path in kept)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_made(lm, workplace: Path) -> None:
    (workplace / "checkpoints").write_text("in the way")
    code, _, err = lm("fit", "--config", "tiny.yaml")
    assert code == 2
    assert err == "error: checkpoints/tiny cannot be written to: checkpoints is a file, no folder: move it away\n"


def test_lm_debug_shows_the_traceback(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm.errors import UserError

    monkeypatch.setenv("LM_DEBUG", "1")
    with pytest.raises(UserError, match=r"none.yaml"):
        lm("fit", "--config", "none.yaml")


def test_a_refused_start_leaves_the_logs_alone(lm, harmed: Path) -> None:
    (harmed / "logs/tiny").mkdir(parents=True)
    (harmed / "logs/tiny/metrics.csv").write_text("step,train/loss\n1,4.0\n12,2.0\n")
    before = digests(harmed / "logs")
    words = ("fit", "--config", "tiny.yaml", "--ckpt_path", "checkpoints/tiny/step=0000005.ckpt")
    assert lm(*words, "--data.init_args.block_size", 5000)[0] == 2
    assert lm(*words, "--trainer.accumulate_grad_batches", 3)[0] == 2
    after = digests(harmed / "logs")
    assert {name: after[name] for name in before} == before


def test_a_full_data_folder(lm, workplace: Path) -> None:
    folder = workplace / "data"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        code, _, err = lm("fit", "--config", "tiny.yaml")
        assert code == 2
        assert re.fullmatch(r"error: .*/data/tokens could not be written to \(No space left on device\): .*\n", err), (
            err
        )
    finally:
        subprocess.run(["umount", folder], check=True)
