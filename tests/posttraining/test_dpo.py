import json
import math
from pathlib import Path

import pytest
import torch

from lm.checkpoints import checkpoint
from lm.posttraining import DPO
from tests.support.mutants import Mutant, broken
from tests.support.pairs import example, recipe, small, written
from tests.support.runs import assert_runs_equal, stop_with, table

MUTANTS = [
    Mutant("posttraining.dpo", "(self.beta * dscores).unsqueeze(-1)", "dscores.unsqueeze(-1)", "beta forgotten"),
    Mutant("posttraining.dpo", "self.reference[rows]", "self.reference[: len(rows)]", "another pair's reference"),
    Mutant("posttraining.dpo", "logs.sum(-1)", "logs.mean(-1)", "a mean over the tokens"),
]


def check_scores() -> None:
    """A score is beta times the sum of the answer's log-probabilities over the reference's."""
    import lm.posttraining.dpo

    model = lm.posttraining.dpo.DPO(net=small(), beta=0.3)
    model.register_buffer("reference", torch.randn(3, 2, dtype=torch.float64))
    logits, targets, rows = example()
    logs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    wanted = 0.3 * (torch.where(targets == -100, 0.0, logs).sum(-1) - model.reference[rows])
    scores, backward = model.scores(logits, targets, rows)
    torch.testing.assert_close(scores, wanted, rtol=1e-12, atol=1e-13)
    dscores = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(
        backward(dscores), *torch.autograd.grad((dscores * wanted).sum(), logits), rtol=1e-10, atol=1e-13
    )


def test_scores_and_their_gradient() -> None:
    assert DPO.__name__ == "DPO"
    check_scores()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_one_is_found(mutant: Mutant) -> None:
    with broken(mutant), pytest.raises(AssertionError):
        check_scores()


@pytest.mark.slow
def test_the_reference_is_the_network_as_training_begins(lm, workplace: Path) -> None:
    """So the first loss is log 2; and a stopped run keeps it."""
    written()
    words = recipe("DPO")
    code, _, err = lm(*words, "--name", "whole", "--model.init_args.net.init_args.dropout", 0)
    assert code == 0, err
    assert float(table("whole")[0]["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)
    parts = [*words, "--name", "parts", "--model.init_args.net.init_args.dropout", 0]
    assert lm(*parts, *stop_with("StopAt", 7))[0] == 143
    assert lm(*parts, "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")
    kept = checkpoint.load(Path("checkpoints/whole/last.ckpt"))["state_dict"]["reference"]
    assert kept.shape == (60, 2) and kept.isfinite().all()
    code, out, err = lm("validate", "--ckpt_path", "checkpoints/whole/last.ckpt", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["pairs"] == 12 and 0 <= result["accuracy"] <= 1, err
    code, out, _ = lm("sample", "--ckpt_path", "checkpoints/whole/last.ckpt", "--max_new_tokens", 3)
    assert code == 0


def test_other_pairs_than_the_references_are_refused(lm, workplace: Path) -> None:
    written(20)
    words = [*recipe("DPO"), "--trainer.max_steps", 2, "--name", "dpo"]
    assert lm(*words)[0] == 0
    lines = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(lines[::-1]))
    last = "checkpoints/dpo/last.ckpt"
    for again in ([*words, "--trainer.max_steps", 4, "--ckpt_path", "last"], ["validate", "--ckpt_path", last]):
        code, _, err = lm(*again)
        assert code == 2 and "not those that the checkpoint's reference log-probabilities are of" in err, err
