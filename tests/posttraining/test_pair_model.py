import json
from pathlib import Path

import pytest

from lm.data import PairData
from lm.errors import UserError
from tests.support.cases import often
from tests.support.pairs import recipe, written
from tests.support.runs import table

TEXT = ("--data.init_args.corpus", "text.txt")
MODELS = ("DPO", "RewardModel")


@pytest.mark.parametrize("kind", often(MODELS))
def test_training_by_hand_is_training_by_autograd(lm, workplace: Path, kind: str) -> None:
    """In float64, over twelve steps of two micro-batches each, with dropout."""
    written()
    tables = []
    for name in (kind, f"Manual{kind}"):
        words = recipe(name, smoothing=0.1)
        code, out, err = lm(*words, "--trainer.precision", "64-true", "--trainer.accumulate_grad_batches", 2)
        assert code == 0 and "failed" not in out + err, out + err
        tables.append(table(name))
    assert len(tables[0]) >= 12
    for one, other in zip(*tables, strict=True):
        for key in ("train/loss", "train/gradient_norm", "val/loss", "val/margin"):
            assert (one[key] == "") == (other[key] == "")
            if one[key]:
                assert float(other[key]) == pytest.approx(float(one[key]), rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: it has no rejected: expected a text"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "line 2: its rejected is empty: expected a text"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 2: chosen and rejected are equal: expected two"),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "line 2: its rejected is a number: expected a text"),
    ],
)
def test_a_line_that_is_no_pair(workplace: Path, row: dict, message: str) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, row]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=f"^corpus pairs.jsonl, {message}"):
        PairData(corpus="pairs.jsonl").setup("fit")


def test_what_does_not_go_together(lm, workplace: Path) -> None:
    written()
    for words, message in (
        (
            [*recipe("DPO"), "--data", "lm.data.TextData", *TEXT],
            "model DPO learns from pairs, and data TextData has texts",
        ),
        ([*recipe("ManualDPO"), "--model.init_args.audit_every", 3], "model.audit_every is for lm.training.Manual"),
        ([*recipe("DPO"), "--model.init_args.net", "lm.models.MLP"], "pairs need one prediction a token"),
        (
            [*recipe("DPO"), "--data.init_args.block_size", 4],
            "longer than data.block_size 4, all of the train split: make it larger",
        ),
        ([*recipe("DPO"), "--model.init_args.beta", 0], "model.beta is 0: it must be above 0"),
        (
            ["fit", "--config", "tiny.yaml", "--data", "lm.data.PairData", "--data.init_args.corpus", "pairs.jsonl"],
            "LanguageModel learns from texts, and data PairData has pairs",
        ),
    ):
        code, _, err = lm(*words)
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_other_commands_take_pairs(lm, workplace: Path) -> None:
    written()
    words = recipe("DPO")[1:]
    code, out, err = lm("inspect", *words)
    assert code == 0 and "<|assistant|>[" in out, err
    assert lm("plan", *words)[0] == 0
    assert lm("gradients", *words, "--model.init_args.net.init_args.dropout", 0)[0] == 0
