import json
from pathlib import Path

import pytest
import yaml

from lm.data import SourceTargetData
from lm.data.module import IGNORED
from lm.errors import UserError


def written(count: int = 60) -> None:
    lines = [f"{i} and {i + 1}.\t{i + 1}, {i}" for i in range(count)]
    Path("pairs.tsv").write_text("\n".join(lines))


def made(**settings) -> SourceTargetData:
    data = SourceTargetData(**({"corpus": "pairs.tsv", "block_size": 20, "held_out": 10} | settings))
    data.setup("fit")
    return data


def test_only_the_target_and_its_mark_are_learned(workplace: Path) -> None:
    written()
    data = made()
    tokens, targets = data.batch(data._numbers("val"))
    texts = Path("pairs.tsv").read_text().splitlines()
    for row, wanted in zip(tokens, targets, strict=True):
        source, target = data.text_tokenizer.decode(row.tolist()).strip("\x03").split("\x02")
        assert f"{source}\t{target}" in texts
        assert data.text_tokenizer.decode(wanted[wanted != IGNORED].tolist()) == f"{target}\x03"
        assert row[0] == 0 and (row == 1).sum() == 1, "the ids of the marks, whatever the texts are"


def test_lines_are_in_one_split(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written()
    with Path("pairs.tsv").open("a") as file:
        file.write("\n0 and 1.\t1, 0\n5 and 6.\t6, 5\nmuch too long for it\tto be kept")
    data = made()
    drawn, held = set(data.problems(0, 2000).tolist()), set(data._held.tolist())
    assert data.size == 60 and len(held) == 20 and not drawn & held and len(drawn | held) == 60
    assert capsys.readouterr().err == (
        "note: corpus pairs.tsv: 2 lines repeat an earlier one: each counts once\n"
        "note: corpus pairs.tsv: 1 of 61 lines are longer than data.block_size 20: they are left out\n"
    )


def test_bad_lines(workplace: Path) -> None:
    for text, message in {
        "a\tb\na\tc": "pairs.tsv, line 2: its source has another target in line 1: keep one of the two",
        "a": "pairs.tsv, line 1: it has 0 tabs",
        "a\tb": "data.held_out 10 for validation and as many for test leave none to train on: there are 1 problems",
        "a" * 30 + "\tb": "1 of 1 lines are longer than data.block_size 20",
    }.items():
        Path("pairs.tsv").write_text(text)
        with pytest.raises(UserError) as error:
            made()
        assert message in str(error.value)


@pytest.mark.parametrize("mark", range(4))
def test_no_text_has_a_character_before_the_marks(workplace: Path, mark: int) -> None:
    """It would get one of their ids."""
    for source, target in ((f"a{chr(mark)}", "b"), ("a", f"{chr(mark)}b")):
        Path("pairs.jsonl").write_text("\n" + json.dumps({"source": source, "target": target}))
        with pytest.raises(UserError, match="pairs.jsonl, line 2: it has a control character, 0 to 3, which are marks"):
            made(corpus="pairs.jsonl")


def test_it_is_fitted_and_asked(lm, workplace: Path) -> None:
    """From one file to a checkpoint that needs neither the file nor the recipe."""
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"source": "xy"[i % 2] * (i // 2 + 1), "target": "ab"[i % 2]}) + "\n" for i in range(24))
    )
    net = {"class_path": "lm.models.Seq2Seq", "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16, "start_token": 1}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    recipe = {
        "trainer": {"max_steps": 60, "val_check_interval": 30, "accelerator": "cpu", "devices": 1},
        "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": net, "optimizer": optimizer}},
        "data": {
            "class_path": "lm.data.SourceTargetData",
            "init_args": {"corpus": "pairs.jsonl", "block_size": 20, "held_out": 4, "batch_size": 16},
        },
    }
    Path("pairs.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = lm("fit", "--config", "pairs.yaml")
    assert code == 0 and "exact match" in out, err
    code, out, err = lm("solve", "--ckpt_path", "checkpoints/pairs/last.ckpt", "--split", "test")
    assert code == 0 and "| all | 4 | 4 | 100.00% |" in out and out.count("| all") == 1, err
    Path("pairs.jsonl").unlink()
    code, out, err = lm("solve", "--ckpt_path", "checkpoints/pairs/last.ckpt", "xxx", "yyyyy")
    assert (code, out) == (0, "a\nb\n"), err
    code, out, _ = lm("sample", "--ckpt_path", "checkpoints/pairs/last.ckpt", "--prompt", "yy", "--temperature", 0)
    assert (code, out) == (0, "yy → b\n")
    bad = {"": "has 0 characters", "x" * 19: "has 19 characters: it takes 1 to 18", "z": "lacks 'z'"}
    for text, message in bad.items():
        code, _, err = lm("solve", "--ckpt_path", "checkpoints/pairs/last.ckpt", text)
        assert code == 2 and message in err and err.count("\n") == 1, err
