import json
from pathlib import Path

import pytest
import torch

from lm.data import PairData
from lm.models import GPT
from lm.posttraining.reward_model import last_token, scalar_head
from lm.training.optimizers import parameter_groups
from tests.support.mutants import Mutant, broken
from tests.support.pairs import example, recipe, small, written
from tests.support.runs import assert_runs_equal, stop_with

HERE = "torch.zeros_like(values).scatter(-1, last, dscores.unsqueeze(-1))"
WRONG = Mutant("posttraining.reward_model", HERE, HERE.replace("last", "last - 1"), "another token's gradient")


def check_scores() -> None:
    """A score is the head's output at the last token, whatever follows."""
    import lm.posttraining.reward_model

    model = lm.posttraining.reward_model.RewardModel(net=small())
    logits, targets, rows = example()
    logits = logits.detach()[..., :1].requires_grad_()
    scores, backward = model.scores(logits, targets, rows)
    assert torch.equal(scores[:, 0], logits[:, 0, -1, 0]), "of a text that fills its sequence"
    assert torch.equal(scores[:, 1], logits[:, 1, -1, 0]), "of one that ends one before: its end is the last token"
    dscores = torch.randn(3, 2, dtype=torch.float64)
    wanted = torch.autograd.grad((dscores * scores).sum(), logits)[0]
    torch.testing.assert_close(backward(dscores), wanted, rtol=1e-12, atol=0)


def test_scores_and_their_gradient() -> None:
    check_scores()
    with broken(WRONG), pytest.raises(AssertionError):
        check_scores()


def test_a_head_of_one_number_has_no_bound_and_its_state_stays_where_it_was() -> None:
    net = GPT(11, 8, n_layer=1, n_head=2, n_embd=8, logit_soft_cap=1.0)
    scalar_head(net)
    torch.nn.init.normal_(net.lm_head.weight, std=100.0)
    assert float(net(torch.tensor([[1, 2, 3]])).detach().abs().max()) > 1
    matrices = parameter_groups(net)[0]
    assert matrices["n_hidden"] == 4 and matrices["params"][4] is net.lm_head.weight, "after the hidden ones"


def test_a_reward_does_not_depend_on_padding(workplace: Path) -> None:
    written()
    torch.manual_seed(1)
    nets = []
    for block_size in (24, 40):
        data = PairData(corpus="pairs.jsonl", block_size=block_size, batch_size=4)
        data.setup("fit")
        torch.manual_seed(1)
        net = GPT(data.vocab_size, 40, n_layer=2, n_head=2, n_embd=16, positions="rotary").double()
        scalar_head(net)
        torch.nn.init.normal_(net.lm_head.weight)
        tokens, targets, _ = data.batch(list(range(20)))
        values = net(tokens.flatten(0, 1))[..., 0].unflatten(0, (-1, 2))
        nets.append(values.gather(-1, last_token(targets)).squeeze(-1))
        ends = tokens.gather(-1, last_token(targets)).squeeze(-1)
        assert (ends == data.text_tokenizer.special_ids["<|end|>"]).all()
    torch.testing.assert_close(*nets, rtol=1e-12, atol=1e-13)
    assert nets[0].std() > 0.01


def test_where_a_reward_model_does_not_belong(lm, workplace: Path) -> None:
    """And where one goes on: by --ckpt_path, as it is told."""
    written()
    words = [*recipe("RewardModel"), "--trainer.max_steps", 2, "--name", "reward"]
    code, _, err = lm(*words, "--samples.max_new_tokens", 5)
    assert code == 0, err
    seen = b"".join(path.read_bytes() for path in Path("logs/reward").glob("events*"))
    assert b"val/margin" in seen and b"sample" not in seen, "no text of a network that writes none"
    last = "checkpoints/reward/last.ckpt"
    code, _, err = lm(*words, "--name", "again", "--init_from", last)
    assert code == 2 and f"--init_from {last}: it is a reward model" in err and "--ckpt_path" in err, err
    assert err.count("\n") == 1
    assert lm(*words, "--ckpt_path", last, "--trainer.max_steps", 4)[0] == 0
    code, _, err = lm("bench", *words[1:3], "--generate")
    assert code == 2 and "--generate: model RewardModel writes no text" in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_it_learns_what_is_preferred_and_resumes(lm, workplace: Path) -> None:
    written()
    words = [*recipe("RewardModel"), "--trainer.max_steps", 40, "--trainer.val_check_interval", 20]
    words += ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0.01]
    code, _, err = lm(*words, "--name", "whole")
    assert code == 0, err
    assert lm(*words, "--name", "parts", *stop_with("StopAt", 27))[0] == 143
    assert lm(*words, "--name", "parts", "--ckpt_path", "last")[0] == 0
    assert_runs_equal("whole", "parts")
    code, out, err = lm("validate", "--ckpt_path", "checkpoints/whole/last.ckpt", "--split", "test", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["accuracy"] == 1 and result["margin"] > 0, err
    code, _, err = lm("sample", "--ckpt_path", "checkpoints/whole/last.ckpt")
    assert code == 2 and "it is a reward model, which writes no text" in err and err.count("\n") == 1
    code, _, err = lm("export", "--ckpt_path", "checkpoints/whole/last.ckpt", "--output", "out")
    assert code == 2 and "a reward model is no network that writes" in err and not Path("out").exists()


@pytest.mark.slow
def test_it_begins_with_another_runs_weights(lm, workplace: Path) -> None:
    written()
    lines = [{"prompt": "say 0123456789", "completion": "ab!"}] * 30
    Path("chats.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    chats = ["--data", "lm.data.ChatData", "--data.init_args.corpus", "chats.jsonl", "--data.init_args.block_size", 24]
    assert lm("fit", "--config", "tiny.yaml", *chats)[0] == 0
    code, out, err = lm(*recipe("RewardModel"), "--init_from", "checkpoints/tiny/last.ckpt")
    assert code == 0 and "from the weights of checkpoints/tiny/last.ckpt, step 12" in out, err
