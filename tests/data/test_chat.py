import io
import json
from pathlib import Path

import pytest
import torch

from lm.data import ChatData
from lm.data.chat import sequences
from lm.data.module import IGNORED
from lm.errors import UserError
from lm.models import GPT
from tests.conftest import RECIPE

ASK = ["fit", "--config", "tiny.yaml", "--data", "lm.data.ChatData", "--data.init_args.corpus", "chats.jsonl"]
NET = "--model.init_args.net.init_args"


def written(count: int = 40, long: int = 0) -> None:
    lines = [{"prompt": f"say {chr(97 + i % 26)}{i}", "completion": f"{i}!" * (1 + i % 3)} for i in range(count)]
    lines += [{"prompt": "x" * 200, "completion": "y"}] * long
    Path("chats.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def made(**settings) -> ChatData:
    data = ChatData(corpus="chats.jsonl", **{"tokenizer": "byte", "block_size": 64, "batch_size": 4} | settings)
    data.setup("fit")
    return data


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_the_answers_and_their_ends(workplace: Path, packed: bool) -> None:
    written()
    data = made(packed=packed)
    tokenizer = data.text_tokenizer
    end, eot = tokenizer.special_ids["<|end|>"], tokenizer.eot
    seen = 0
    for row in data.rows:
        tokens, targets = sequences([row], 64, data.text_tokenizer)
        tokens, targets = tokens[0], targets[0]
        assert tokens.shape == targets.shape == (64,)
        following = torch.cat([tokens[1:], targets[-1:]])
        assert torch.equal(targets[targets != IGNORED], following[targets != IGNORED])
        answers = [one.ids[one.written].tolist() for one in row]
        assert targets[targets != IGNORED].tolist() == [i for answer in answers for i in answer]
        assert all(answer[-1] == end for answer in answers) and (targets == end).sum() == len(row)
        assert (tokens == eot).sum() >= len(row) - 1
        seen += len(row)
    assert seen == len(data.conversations["train"]) and (len(data.rows) < seen) == packed
    assert sum(len(data.eval_dataset("val")[k][0]) for k in range(len(data.eval_dataset("val")))) == 4


def test_a_packed_conversation_sees_no_other(workplace: Path) -> None:
    written()
    data = made(packed=True)
    torch.manual_seed(1)
    row = max(data.rows, key=len)
    net = GPT(
        data.vocab_size, 64, n_layer=2, n_head=2, n_embd=16, positions="rotary", document_end=data.tokenizer.eot,
        token_shift=True,
    )  # fmt: skip
    together, at = net(sequences([row], 64, data.text_tokenizer)[0])[0], 0
    assert len(row) > 1
    for one in row:
        size = min(len(one.ids), 64 - at)
        alone = net(sequences([[one]], 64, data.text_tokenizer)[0])[0, :size]
        torch.testing.assert_close(together[at : at + size], alone, rtol=1e-4, atol=1e-5)
        at += size + 1


def test_packing_needs_a_network_that_keeps_them_apart(lm, workplace: Path) -> None:
    written()
    words = [*ASK, "--data.init_args.tokenizer", "byte", "--data.init_args.packed", "true"]
    words += ["--data.init_args.block_size", 64, "--trainer.max_steps", 1]
    code, _, err = lm(*words)
    assert code == 2 and "data.packed: conversations in one sequence would see each other: say model.net" in err
    assert "document_end 256, or data.packed false" in err and err.count("\n") == 1
    assert lm(*words, f"{NET}.document_end", 256)[0] == 0


def test_long_conversations_are_counted(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    written(long=3)
    data = made()
    assert (
        "note: corpus chats.jsonl: 3 of 43 conversations are longer than data.block_size 64" in capsys.readouterr().err
    )
    assert sum(map(len, data.conversations.values())) == 40
    with pytest.raises(UserError, match="43 of 43 conversations are longer than data.block_size 4, all of the train"):
        made(block_size=4)


@pytest.mark.slow
def test_from_text_to_an_assistant_that_ends_its_turns(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the end of a turn no target, the answer would go on."""
    answers = {"one": "no.", "six": "is it; x."}
    rows = [{"prompt": k, "completion": v} for k, v in answers.items()]
    Path("chats.jsonl").write_text("".join(f"{json.dumps(rows[i % 2])}\n" for i in range(40)))
    assert lm("fit", "--config", "tiny.yaml", f"{NET}.dropout", 0)[0] == 0
    fast = ["--trainer.max_steps", 80, "--trainer.val_check_interval", 80, "--data.init_args.batch_size", 8]
    still = ["--model.init_args.schedule", "lm.training.schedules.Constant", "--model.init_args.optimizer"]
    still += ["torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0.01]
    words = [*ASK, *fast, *still, "--init_from", "checkpoints/tiny/last.ckpt", "--name", "sft", f"{NET}.dropout", 0]
    words += ["--data.init_args.tokenizer", "inherit", "--data.init_args.packed", "true"]
    code, _, err = lm(*words)
    assert code == 2 and "document_end" in err
    eot = int(err.split("document_end ")[1].split(",")[0])
    code, out, err = lm(*words, f"{NET}.document_end", eot)
    assert code == 0 and f"(vocabulary: {eot} tokens taken over, 5 new, 0 left out)" in out, err
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/new\nsix\n"))
    code, out, err = lm("chat", "--ckpt_path", "checkpoints/sft/last.ckpt", "--temperature", 0, "--max_new_tokens", 12)
    assert (code, out) == (0, "no.\nis it; x.\n"), err
    code, out, _ = lm("validate", "--ckpt_path", "checkpoints/sft/last.ckpt", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["exact_match"] == 1


def test_a_line_that_is_none_ends_the_command(lm, workplace: Path) -> None:
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "ai", "content": "b"}]}')
    code, _, err = lm(*ASK)
    assert code == 2 and err.count("\n") == 1
    assert "corpus chats.jsonl, line 1, message 2: its role is 'ai': expected assistant" in err


def test_inspect_shows_ids_text_and_mask(lm, workplace: Path) -> None:
    Path("chats.jsonl").write_text('{"prompt": "<|user|>a", "completion": "be"}\n' * 30)
    words = ["inspect", *ASK[1:], "--data.init_args.block_size", 32]
    code, out, err = lm(*words)
    assert code == 0, err
    assert "\n<|user|><|user|>a<|end|><|assistant|>[be<|end|>]\n" in out
    code, out, _ = lm(*words, "--json")
    shown = json.loads(out.splitlines()[-1])["sequence"]
    assert shown["pieces"][:3] == ["<|user|>", "<", "|"] and shown["predicted"][-4:] == [False, True, True, True]
    assert len(shown["ids"]) == len(shown["pieces"]) == len(shown["predicted"]) == 15
    code, out, _ = lm("inspect", "--config", "tiny.yaml", "--json")
    assert RECIPE["data"] and "sequence" not in json.loads(out.splitlines()[-1])
