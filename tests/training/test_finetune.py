import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm import models
from lm.checkpoints import checkpoint
from lm.checkpoints.schema import Saved
from lm.errors import UserError
from lm.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, to_state
from lm.tokenizers.merges import to_text
from lm.training import audit, compatibility, recipes
from lm.training.finetune import common_ids, take_weights
from lm.training.loggers.log_files import read_csv

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
    assert checkpoint.peek(Path("checkpoints/tuned/last.ckpt")).step == 6


def test_another_vocabulary_goes_over_by_symbol_or_is_inherited(lm, pretrained: Path) -> None:
    """By gradients by hand, too: without a learning rate, a row is the checkpoint's or as the network begins."""
    Path("other.txt").write_text(Path("shorter.txt").read_text() + "ẞ" * 40 + "ß")
    still = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0]
    words = [*RECIPE, *still, "--trainer.max_steps", 1, "--data.init_args.corpus", "other.txt"]
    assert lm(*words, "--name", "new")[0] == 0
    there, new = (Saved.of(checkpoint.load(Path(f"checkpoints/{run}/last.ckpt"))) for run in ("tiny", "new"))
    old, symbols = there.tokenizer["symbols"], new.tokenizer["symbols"]
    assert {*symbols} - {*old} == {"ẞ", "ß"} and {*old} - {*symbols} == {"x"}
    for kind in ("LanguageModel", "ManualLanguageModel"):
        model = ("--model", f"lm.training.{kind}")
        code, out, err = lm(*words, "--name", kind, "--init_from", LAST, *model)
        assert code == 0, err
        assert f"{LAST}, step 12 (vocabulary: {len(old) - 1} tokens taken over, 2 new, 1 left out)\n" in out
        weights = Saved.of(checkpoint.load(Path(f"checkpoints/{kind}/last.ckpt"))).weights
        for i, symbol in enumerate(symbols):
            row = new.weights["wte.weight"][i] if symbol in "ẞß" else there.weights["wte.weight"][old.index(symbol)]
            assert torch.equal(weights["wte.weight"][i], row)
        assert all(torch.equal(value, there.weights[key]) for key, value in weights.items() if value.shape[0] != i + 1)
    words += ["--name", "tuned", "--init_from", LAST, "--data.init_args.corpus", "shorter.txt"]
    assert lm(*words, "--data.init_args.tokenizer", "inherit")[0] == 0
    assert checkpoint.peek(Path("checkpoints/tuned/last.ckpt")).tokenizer == there.tokenizer
    words += ["--data.init_args.tokenizer", "inherit", "--ckpt_path", "last", "--trainer.max_steps", 14]
    assert lm(*words)[0] == 0
    assert lm("validate", "--ckpt_path", "checkpoints/tuned/last.ckpt")[0] == 0


def pairs(*tokens: bytes, special: dict[str, int] | None = None, end: str = "<|endoftext|>") -> BytePairTokenizer:
    ranks = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), *tokens])}
    return BytePairTokenizer(to_text(ranks), special=special, end_of_text=end)


VOCABULARIES: dict[str, tuple[Tokenizer, Tokenizer]] = {
    "char": (CharTokenizer("abcd>"), CharTokenizer("bcxdf>")),
    "as many": (CharTokenizer("abcd>"), CharTokenizer("abce>")),
    "an end of text": (CharTokenizer("abcd>", end_of_text=True), CharTokenizer("abc>", end_of_text=True)),
    "char to byte": (CharTokenizer("abcd>", end_of_text=True), ByteTokenizer()),
    "byte to char": (ByteTokenizer(), CharTokenizer("abcd>é", end_of_text=True)),
    "pairs": (pairs(b"ab", b"cd"), pairs(b"bc", b"cd", special={"<s>": 260, "</s>": 258}, end="</s>")),
}
NETS: dict[str, Callable[..., torch.nn.Module]] = {
    "Bigram": models.Bigram,
    "MLP": partial(models.MLP, n_embd=4, n_hidden=8),
    "WaveNet": partial(models.WaveNet, n_embd=4, n_hidden=8),
    "tied": partial(models.GPT, n_layer=1, n_head=2, n_embd=16),
    "untied": partial(models.GPT, n_layer=1, n_head=1, n_embd=6, tie_weights=False, head_bias=True, init_std=None),
    "Seq2Seq": partial(models.Seq2Seq, n_layer=1, n_head=2, n_embd=16),
}


@pytest.mark.parametrize("vocabularies", VOCABULARIES)
@pytest.mark.parametrize("name", NETS)
def test_logits_of_known_tokens_stay(workplace: Path, name: str, vocabularies: str) -> None:
    """Every tensor with the vocabulary in it goes over, whatever the network; widths may equal its size."""
    there, here = VOCABULARIES[vocabularies]
    starts = [{"start_token": int(one.encode(">")[0])} if name == "Seq2Seq" else {} for one in (there, here)]
    old, new = (NETS[name](one.n_vocab, 8, **start) for one, start in zip((there, here), starts, strict=True))
    with torch.no_grad():
        for parameter in old.parameters():
            parameter += torch.randn_like(parameter)
    recipes = [{"net": {"class_path": "lm.models.Any", "init_args": start}} for start in starts]
    sizes = {"vocab_size": there.n_vocab, "block_size": 8}
    config = {"model": {"init_args": recipes[0]}, "trainer": {"precision": "32-true"}}
    state = {f"net.{key}": value for key, value in old.state_dict().items()}
    checkpoint.write(
        Saved(step=1, state=state, config=config, tokenizer=to_state(there), **sizes).imported(), Path("a")
    )
    said = take_weights(new, partial(NETS[name], **starts[1]), here, Path("a"))
    ids = common_ids(there, here, "a")
    assert f" {len(ids)} tokens taken over, {here.n_vocab - len(ids)} new, {there.n_vocab - len(ids)} left out)" in said
    assert {bytes(here.token_bytes()[new]) for new in ids.values()} >= {b"b", b"c", b">"}
    assert (there.eot in ids) == (there.eot is not None) and ids.get(there.eot or 0) in (here.eot, 0)
    text = there.encode("bcbc>bcc")[None]
    tokens = torch.tensor([[ids[int(i)] for i in text[0]]])
    with torch.no_grad():
        before, after = old.eval()(torch.from_numpy(text)), new.eval()(tokens)
    torch.testing.assert_close(after[..., list(ids.values())], before[..., list(ids)])


def test_a_vocabulary_with_too_little_in_common_is_refused(lm, pretrained: Path, monkeypatch) -> None:
    words = [*RECIPE, "--name", "tuned", "--init_from", LAST]
    Path("p.tiktoken").write_text(pairs(b"th").ranks)
    Path("greek.txt").write_text("αβγδεζηθικλμνξοπρστυφχψω \n" * 90)
    for extra, expected in (
        (
            ["--data.init_args.tokenizer", "p.tiktoken"],
            "bytepair of 258 symbols here: use a data.tokenizer of the same",
        ),
        (["--data.init_args.corpus", "greek.txt"], "char of 26 symbols here, 2 in common, which is too few: use a "),
    ):
        code, _, err = lm(*words, *extra)
        assert code == 2 and expected in err and len(err.splitlines()) == 1, err
        assert f"error: --init_from {LAST} has another vocabulary: char of " in err


def test_an_end_of_documents_that_has_another_id_is_the_same_setting(lm, workplace: Path) -> None:
    for name, words in (("a", ["abc", "cab", "bad"] * 30), ("b", ["be", "cab", "fed"] * 30)):
        Path(f"{name}.jsonl").write_text("".join(f'{{"text": "{word}"}}\n' for word in words))
        words = ["prepare", "--source", f"{name}.jsonl", "--output", name, "--tokenizer", "char"]
        assert lm(*words, "--val_fraction", 0.3)[0] == 0
    words = [*RECIPE, "--trainer.max_steps", 1, "--data.init_args.block_size", 8]
    assert lm(*words, f"{NET}.document_end", 4, "--data.init_args.corpus", "a")[0] == 0
    other = [f"{NET}.document_end", 6, "--data.init_args.corpus", "b", "--name", "tuned", "--init_from", LAST]
    code, out, err = lm(*words, *other)
    assert code == 0 and "(vocabulary: 5 tokens taken over, 2 new, 0 left out)" in out, err


def test_a_recipe_without_a_network_has_the_checkpoints_and_one_with_is_compared(lm, workplace: Path) -> None:
    assert lm(*RECIPE, f"{NET}.norm", "rms", f"{NET}.dropout", 0)[0] == 0
    code, _, err = lm(*RECIPE, "--name", "tuned", "--init_from", LAST)
    assert code == 2 and "norm is rms there and layer in this configuration" in err
    recipe = yaml.safe_load(Path("tiny.yaml").read_text()) | {"init_from": LAST}
    recipe["model"]["init_args"].pop("net")
    Path("tune.yaml").write_text(yaml.safe_dump(recipe))
    words = ("--config", "tune.yaml", f"{NET}.dropout", 0.1)
    for kind in ("LanguageModel", "ManualLanguageModel"):
        code, out, err = lm("fit", *words, "--name", kind, "--model", f"lm.training.{kind}", "--trainer.max_steps", 1)
        assert code == 0 and f"from the weights of {LAST}, step 12\n" in out, err
        net = Saved.of(checkpoint.load(Path(f"checkpoints/{kind}/last.ckpt"))).net["init_args"]
        assert (net["norm"], net["n_embd"], net["dropout"]) == ("rms", 16, 0.1)
    rows = json.loads(lm("gradients", *words, "--json")[1].splitlines()[-1])["rows"]
    expected = [row["shape"] for row in rows if row["name"] == "wte.weight"]
    assert expected == [list(checkpoint.load(Path(LAST))["state_dict"]["net.wte.weight"].shape)]
    found = json.loads(lm("plan", *words, "--json")[1].splitlines()[-1])
    assert found["parameters"] == sum(row["shape"][0] * (row["shape"] + [1])[1] for row in rows if row["shape"])
    code, _, err = lm("fit", *words, "--init_from", "nowhere.ckpt")
    assert code == 2 and err == "error: checkpoint nowhere.ckpt: there is no such file\n"


def test_gradients_are_audited_at_the_checkpoints_weights(lm, workplace: Path, monkeypatch) -> None:
    """They are those of the loss that it has, not of an untrained network."""
    assert lm(*RECIPE, "--model.init_args.optimizer", "torch.optim.AdamW", f"{NET}.dropout", 0)[0] == 0
    seen: list[torch.Tensor] = []
    check = audit.check
    monkeypatch.setattr(audit, "check", lambda net, *rest: (seen.append(net.wte.weight.detach()), check(net, *rest))[1])
    assert lm("gradients", "--config", "tiny.yaml", "--init_from", LAST, f"{NET}.dropout", 0)[0] == 0
    assert torch.equal(seen[0], checkpoint.load(Path(LAST))["state_dict"]["net.wte.weight"].double())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([f"{NET}.n_embd", 32], "is of another architecture: n_embd is 16 there and 32 in this configuration"),
        ([f"{NET}.n_layer", 2], "n_layer is 1 there and 2 in"),
        ([f"{NET}.n_kv_head", 1], "is of another shape: net.h.0.attn.c_attn.weight is (48, 16) there and (32, 16) in"),
        (["--data.init_args.block_size", 32], "net.wpe.weight is (16, 16) there and (32, 16) in"),
        (["--init_from", "nowhere.ckpt"], "checkpoint nowhere.ckpt: there is no such file"),
    ],
)
def test_other_shapes_and_missing_files(lm, pretrained: Path, extra: list, message: str) -> None:
    code, _, err = lm(*RECIPE, "--name", "tuned", "--init_from", LAST, *extra)
    assert code == 2
    assert message in err, err
    assert err.count("\n") == 1


def test_inherit_needs_a_checkpoint(lm, workplace: Path) -> None:
    code, _, err = lm(*RECIPE, "--data.init_args.tokenizer", "inherit")
    assert code == 2
    assert "data.tokenizer inherit takes the tokenizer of a checkpoint: say which with --init_from" in err


SETTINGS: list[tuple[str, object]] = [
    ("n_head", 4),
    ("attention", "separate"),
    ("feed_forward", "relu"),
    ("residual", False),
    ("norm", "rms"),
    ("norm_position", "post"),
    ("positions", "none"),
    ("rope_theta", 5000.0),
    ("logit_soft_cap", 30.0),
    ("document_end", 0),
    ("tie_weights", False),
    ("qk_norm", True),
    ("projection", False),
    ("bias", False),
    ("head_bias", True),
    ("token_shift", True),
]
"""What a GPT computes from given weights depends on each; few of them show in the weights' shapes."""


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_setting_that_shapes_do_not_show_is_refused_by_name(
    lm, request: pytest.FixtureRequest, name: str, value: object
) -> None:
    net: dict[str, Any] = {"class_path": "lm.models.GPT", "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16}}
    there = {"model": {"init_args": {"net": net}}}
    here = {"model": {"init_args": {"net": {**net, "init_args": {**net["init_args"], name: value}}}}}
    with pytest.raises(UserError, match=f"^x.ckpt is of another architecture: {name} is .* there and .* in this"):
        compatibility.check_network("x.ckpt", there, here)
    compatibility.check_network("x.ckpt", there, there)
    if name in ("residual", "n_head", "feed_forward"):  # the whole way once or twice
        request.getfixturevalue("pretrained")
        code, _, err = lm(*RECIPE, "--name", "tuned", "--init_from", LAST, f"{NET}.{name}", value)
        assert code == 2 and f"error: --init_from {LAST} is of another architecture: {name} is " in err, err
        assert err.count("\n") == 1 and not Path("checkpoints/tuned/last.ckpt").exists()


NETWORKS = {
    "Bigram": {},
    "MLP": {"n_embd": 4, "n_hidden": 8, "batch_norm": False, "bias": True},
    "WaveNet": {"n_embd": 4, "n_hidden": 8, "fuse": 4},
    "GatedWaveNet": {"n_embd": 4, "n_layer": 2},
    "GPT": {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.2},
    "Seq2Seq": {"n_layer": 1, "n_head": 2, "n_embd": 16, "start_token": 1},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_each_setting_of_every_network_is_compared_and_a_default_is_as_good_as_said(network: str) -> None:
    path = f"lm.models.{network}"
    signature = inspect.signature(getattr(models, network))
    defaults = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    given = NETWORKS[network]

    def recipe(**arguments: object) -> dict[str, Any]:
        return {"model": {"init_args": {"net": {"class_path": path, "init_args": arguments}}}}

    compatibility.check_network("x.ckpt", recipe(**given), recipe(**defaults | given))
    compatibility.check_network("x.ckpt", recipe(**defaults | given), recipe(**given))
    for name, value in (defaults | given).items():
        here = recipe(**given | {name: not value if isinstance(value, bool) else "another"})
        if name in ("dropout", "key_dropout", "init_std", "base_width", "head_scale", "momentum") or (
            value is None and name in recipes.DERIVED
        ):
            compatibility.check_network("x.ckpt", recipe(**given), here)
            continue
        with pytest.raises(UserError, match=f"architecture: {name} is "):
            compatibility.check_network("x.ckpt", recipe(**given), here)


def test_a_shorter_context_takes_the_first_positions_and_the_line_says_so(lm, pretrained: Path) -> None:
    still = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.init_args.lr", 0]
    words = ["--data.init_args.block_size", 8, f"{NET}.dropout", 0, "--trainer.max_steps", 1, *still]
    code, out, err = lm(*RECIPE, "--name", "tuned", "--init_from", LAST, *words)
    assert code == 0, err
    before, after = (checkpoint.load(Path(path))["state_dict"] for path in (LAST, "checkpoints/tuned/last.ckpt"))
    assert torch.equal(after["net.wpe.weight"], before["net.wpe.weight"][:8])
    assert all(torch.equal(after[name], value) for name, value in before.items() if "wpe" not in name)
    assert f", from the weights of {LAST}, step 12 (wpe.weight: the first 8 of 16 positions)\n" in out


@pytest.mark.parametrize("length", [8, 32])
def test_rotary_positions_go_on_in_either_direction(lm, workplace: Path, length: int) -> None:
    rotary = [f"{NET}.positions", "rotary", "--trainer.max_steps", 2]
    assert lm(*RECIPE, *rotary)[0] == 0
    words = [*rotary, "--name", "tuned", "--init_from", LAST, "--data.init_args.block_size", length]
    code, out, err = lm(*RECIPE, *words)
    assert code == 0, err
    assert f"from the weights of {LAST}, step 2\n" in out


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, vocab_size: int, block_size: int, *, width: int = 8, act: nn.Module | None = None, scale=1.0):
        super().__init__()
        self.vocab_size, self.block_size, self.scale, self.act = vocab_size, block_size, scale, act or nn.Tanh()
        self.table, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.scale * self.head(self.act(self.table(tokens)))
"""


def test_a_network_of_the_users_own(lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(workplace))
    recipe = yaml.safe_load(Path("tiny.yaml").read_text())
    net = recipe["model"]["init_args"]["net"] = {"class_path": "own_network.Net", "init_args": {}}
    recipe["trainer"]["max_steps"] = 2
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert lm(*RECIPE)[0] == 0
    for arguments, refusal in (
        ({"width": 8, "scale": 1.0}, ""),
        ({"scale": 2.0}, "scale is 1.0 there and 2.0 in"),
        ({"act": {"class_path": "torch.nn.GELU"}}, "act is null there and torch.nn.GELU in"),
    ):
        net["init_args"] = arguments
        Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
        code, _, err = lm(*RECIPE, "--name", f"tuned{len(refusal)}", "--init_from", LAST)
        assert (code, refusal in err) == (2 if refusal else 0, True), err


def test_symbols_that_an_inherited_tokenizer_lacks(lm, workplace: Path) -> None:
    """The way out is in the message, and leads there."""
    few = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 2)
    assert lm("fit", "--config", "tiny.yaml", *few)[0] == 0
    Path("new.txt").write_text(Path("text.txt").read_text() + "$£")
    words = ("fit", "--config", "tiny.yaml", "--name", "tuned", "--init_from", "checkpoints/tiny/last.ckpt", *few)
    words += ("--data.init_args.corpus", "new.txt", "--data.init_args.tokenizer")
    code, _, err = lm(*words, "inherit")
    assert code == 2 and err.count("\n") == 1
    assert "lacks '$', '£': say data.tokenizer char in place of inherit, which adds them as untrained ones" in err
    code, out, err = lm(*words, "char")
    assert code == 0 and "2 new, 0 left out" in out, err
