"""Networks and tokenizers go to Hugging Face's transformers and come back, and compute there what they compute here."""

import inspect
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.checkpoints import checkpoint, huggingface
from lm.checkpoints.imports import import_any
from lm.checkpoints.layouts import COMMON, LAYOUTS, UNPLACED
from lm.checkpoints.restore import load_network
from lm.checkpoints.schema import Saved
from lm.corpus import formats, sources
from lm.corpus.tokenizer_training import train
from lm.generation.sampling import Sampler, generate
from lm.models import GPT
from lm.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, make
from lm.tokenizers import huggingface as tokenizer_files
from tests.conftest import MISSING, REFERENCE
from tests.support.cases import often
from tests.support.exports import SMALL, SYMBOLS, TODAY, T, exact, written

Run = Callable[..., tuple[int, str, str]]
NETS: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "gpt2 without biases": {**SMALL, "bias": False, "n_head": 2},
    "gpt2 untied": {**SMALL, "tie_weights": False, "hidden_size": 40, "feed_forward": "relu"},
    "gpt2 some biases": {**SMALL, "attention_bias": False, "norm_eps": 1e-3, "feed_forward": "relu_squared"},
    "gpt2 erf": {**SMALL, "feed_forward": "gelu_erf", "n_kv_head": 4, "dropout": 0.2},
    "llama": {**SMALL, **TODAY, "bias": False, "tie_weights": False},
    "llama tied": {**SMALL, **TODAY, "bias": False, "n_kv_head": 1, "norm_eps": 1e-6, "hidden_size": 20},
    "llama biases": {**SMALL, **TODAY, "n_kv_head": 2, "rope_theta": 5e5, "dropout": 0.1},
    "llama attention's biases": {**SMALL, **TODAY, "bias": False, "attention_bias": True, "n_kv_head": 2},
    "llama the others' biases": {**SMALL, **TODAY, "bias": True, "attention_bias": False, "tie_weights": False},
}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """transformers, whose RMSNorm is computed in the precision of its input, rather than in 32 bits always."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install lm[hf]")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def greedy(net: torch.nn.Module, prompt: torch.Tensor, count: int) -> list[int]:
    tokens = generate(net, prompt, sampler=Sampler(temperature=0), generator=torch.Generator())
    return [next(tokens).item() for _ in range(count)]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (Saved.of(checkpoint.load(path)).weights for path in (one, other))
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", NETS)
def test_a_network_there_and_back(peer: Any, workplace: Path, name: str) -> None:
    net = written(Path("a.ckpt"), NETS[name]).net
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    theirs, info = peer.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()) and theirs.config.model_type == name.split()[0] and theirs.dtype == torch.float64
    tokens = torch.randint(len(SYMBOLS), (3, T))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, net(tokens), rtol=0, atol=1e-10)
        made = theirs.generate(tokens[:1, :4], do_sample=False, max_new_tokens=T - 4)[0, 4:].tolist()
    assert made == greedy(net, tokens[:1, :4], T - 4)
    import_any(Path("out"), Path("b.ckpt"))
    assert_same_weights(Path("a.ckpt"), Path("b.ckpt"))
    with torch.no_grad():
        assert torch.equal(exact(Path("b.ckpt"))(tokens), net(tokens))
    huggingface.export_huggingface(Path("b.ckpt"), Path("again"))
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("again", file).read_bytes() == Path("out", file).read_bytes()


def random_peer(transformers: Any, seed: int) -> Any:
    """Return a network of transformers, of a random shape, with random weights."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4])
    width = heads * 2 * draw.randint(2, 5)
    common: dict[str, Any] = {"vocab_size": len(SYMBOLS), "tie_word_embeddings": draw.random() < 0.5}
    common |= {"bos_token_id": None, "eos_token_id": None}
    if seed % 2:
        config = transformers.GPT2Config(
            n_positions=T, n_embd=width, n_layer=draw.randint(1, 3), n_head=heads, n_inner=draw.choice([None, 24]),
            activation_function=draw.choice(["gelu_new", "gelu", "relu", "gelu_pytorch_tanh"]), **common,
        )  # fmt: skip
        kind = transformers.GPT2LMHeadModel
    else:
        config = transformers.LlamaConfig(
            max_position_embeddings=T, hidden_size=width, num_hidden_layers=draw.randint(1, 3),
            num_attention_heads=heads, num_key_value_heads=draw.choice([1, heads // 2, heads]),
            intermediate_size=draw.randint(5, 40), rms_norm_eps=draw.choice([1e-5, 1e-6]), head_dim=width // heads,
            rope_parameters={"rope_type": "default", "rope_theta": draw.choice([1e4, 1e5])},
            attention_bias=draw.random() < 0.5, mlp_bias=draw.random() < 0.5, **common,
        )  # fmt: skip
        kind = transformers.LlamaForCausalLM
    torch.manual_seed(seed)
    net = kind(config).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("seed", range(12))
def test_a_network_of_theirs(peer: Any, workplace: Path, seed: int) -> None:
    """As one safetensors file, in shards, as a pickled file of weights, and without its head."""
    theirs, how = random_peer(peer, seed), seed // 2 % 4
    theirs.save_pretrained("theirs", max_shard_size="3KB" if how == 1 else "1GB")
    if how == 2:
        torch.save(load_file("theirs/model.safetensors"), "theirs/pytorch_model.bin")
        Path("theirs/model.safetensors").unlink()
    if how == 3 and theirs.config.tie_word_embeddings:
        prefix = LAYOUTS[theirs.config.model_type].prefix
        weights = load_file("theirs/model.safetensors")
        save_file({name.removeprefix(prefix): value for name, value in weights.items()}, "theirs/model.safetensors")
    assert (how == 1) == Path("theirs/model.safetensors.index.json").exists()
    Path("symbols.txt").write_text(SYMBOLS)
    import_any(Path("theirs"), Path("a.ckpt"), tokenizer="char", corpus="symbols.txt")
    tokens = torch.randint(len(SYMBOLS), (3, T))
    with torch.no_grad():
        torch.testing.assert_close(exact(Path("a.ckpt"))(tokens), theirs(tokens).logits, rtol=0, atol=1e-10)
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    back = peer.AutoModelForCausalLM.from_pretrained("out").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[name], value), name


def test_half_precision_becomes_32_bits(workplace: Path) -> None:
    """Every number of 16 bits is one of 32."""
    written(Path("a.ckpt"), SMALL, dtype=torch.bfloat16)
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    assert load_file("out/model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
    import_any(Path("out"), Path("b.ckpt"))
    one, other = (Saved.of(checkpoint.load(Path(name))).weights["wte.weight"] for name in ("a.ckpt", "b.ckpt"))
    assert other.dtype == torch.float32 and torch.equal(one.float(), other)


def long_text() -> str:
    """Return a megabyte of text."""
    if not MISSING:
        return (REFERENCE / "tinyshakespeare.txt").read_text()
    return sources.find("python-docs").read()[: 1 << 20]


TOKENIZERS: dict[str, Callable[[str], Tokenizer]] = {
    "char": lambda text: CharTokenizer(text),
    "char, documents": lambda text: CharTokenizer(text, end_of_text=True),
    "char, an end": lambda text: CharTokenizer(text, end="\n"),
    "byte": lambda text: ByteTokenizer(),
    "trained": lambda text: trained(),
    "gpt2": lambda text: make("gpt2", list),
}


def trained(pattern: str = tokenizer_files.GPT2_PATTERN) -> BytePairTokenizer:
    if not Path("trained.tiktoken").exists():
        Path("corpus.txt").write_text(long_text())
        train(["corpus.txt"], 1000, Path("trained.tiktoken"), formats.Settings())
    return BytePairTokenizer(Path("trained.tiktoken").read_text(), pattern)


@pytest.mark.parametrize("name", often(TOKENIZERS, lambda name: name in ("char", "byte", "trained")))
def test_a_tokenizer_there_and_back(peer: Any, workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gpt2":
        if MISSING:
            pytest.skip(f"LM_DATA_HOME lacks {', '.join(MISSING)}")
        monkeypatch.setenv("LM_DATA_HOME", str(REFERENCE))
    text = long_text()
    ours = TOKENIZERS[name](text)
    files = tokenizer_files.to_files(ours, T)
    Path("out").mkdir()
    for file, content in {**files, "config.json": {"model_type": "gpt2"}}.items():
        Path("out", file).write_text(json.dumps(content))
    theirs = peer.AutoTokenizer.from_pretrained("out")
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot
    assert tokenizer_files.from_files(*files.values()).state() == ours.state()
    if name.startswith("char"):
        with pytest.raises(Exception, match="UNK"):
            theirs("☃")


CHARACTERS = (
    " \n\t\r  \n\n'''sStTdmMlLvVrReE0123456789abcXYZ,.!?-_/é“”ñßſK\u212a\u00a0\u2003\u0085中文😀½²Ⅷ٣ǅा\u0300\x00\x1c"
)


@pytest.mark.parametrize("pattern", often(tokenizer_files.WORDS))
def test_words_are_cut_at_the_same_places(workplace: Path, pattern: str) -> None:
    from tokenizers import Tokenizer as Theirs

    ours = trained(pattern)
    files = tokenizer_files.to_files(ours, T)
    theirs = Theirs.from_str(json.dumps(files["tokenizer.json"]))
    draw = random.Random(5)
    texts = ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 12))) for _ in range(20000)]
    for text, found in zip(texts, theirs.encode_batch(texts), strict=True):
        assert found.ids == ours.encode(text).tolist(), repr(text)
    assert tokenizer_files.from_files(*files.values()).state() == ours.state()


def test_special_tokens_may_come_first(workplace: Path) -> None:
    """SmolLM2 and StarCoder have theirs before the bytes."""
    files = tokenizer_files.to_files(trained(), T)
    model = files["tokenizer.json"]["model"]
    end = model["vocab"].pop("<|endoftext|>")
    model["vocab"] = {name: i + 2 for name, i in model["vocab"].items()} | {"<|start|>": 0, "</s>": 1}
    files["tokenizer.json"]["added_tokens"] = [{"id": 0, "content": "<|start|>"}, {"id": 1, "content": "</s>"}]
    files["tokenizer_config.json"] |= {"eos_token": "</s>", "bos_token": "<|start|>"}
    tokenizer = tokenizer_files.from_files(*files.values())
    text = long_text()[:5000]
    assert tokenizer.encode(text).tolist() == [i + 2 for i in trained().encode(text).tolist()]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eot, tokenizer.n_vocab) == (1, end + 2)
    again = tokenizer_files.to_files(tokenizer, T)
    assert tokenizer_files.from_files(*again.values()).state() == tokenizer.state()


def test_files_of_before_tokenizer_json(workplace: Path) -> None:
    written(Path("a.ckpt"), SMALL, trained())
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    model = json.loads(Path("out/tokenizer.json").read_text())["model"]
    Path("out/vocab.json").write_text(json.dumps(model["vocab"]))
    Path("out/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    Path("out/tokenizer.json").unlink()
    import_any(Path("out"), Path("b.ckpt"))
    assert load_network(Path("b.ckpt")).tokenizer.state() == trained().state()


def test_a_folder_has_what_others_expect(lm: Run) -> None:
    net = written(Path("a.ckpt"), SMALL, ByteTokenizer()).net
    count = sum(parameter.numel() for parameter in net.parameters())
    code, out, _ = lm("export", "--ckpt_path", "a.ckpt", "--format", "hf", "--output", "out", "--json")
    assert code == 0 and json.loads(out) == {"path": "out"}
    assert {path.name for path in Path("out").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip
    card = Path("out/README.md").read_text()
    for part in (
        "| validation loss | 1.2500 |",
        "| optimizer steps | 3 |",
        f"| parameters | {count:,} |",
        "n_embd: 32",
    ):
        assert part in card
    ends = json.loads(Path("out/generation_config.json").read_text())
    assert ends == {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    words = ("export", "--ckpt_path", "a.ckpt", "--format", "hf", "--output", "out")
    code, _, err = lm(*words)
    assert code == 2 and err == "error: --output out: it is there already: say another name, or --overwrite\n"
    assert lm(*words, "--overwrite")[0] == 0
    Path("out/notes.txt").write_text("mine")
    code, _, err = lm(*words, "--overwrite")
    assert code == 2 and "no folder of an export of lm's" in err and Path("out/notes.txt").exists()


def test_a_run_goes_out_and_comes_back(lm: Run) -> None:
    """It samples and evaluates as before, begins a run, and its gradients agree."""
    tokens = ("--data.init_args.tokenizer", "byte")
    assert lm("fit", "--config", "tiny.yaml", *tokens)[0] == 0
    last = "checkpoints/tiny/last.ckpt"
    assert lm("export", "--ckpt_path", last, "--format", "hf", "--output", "out")[0] == 0
    assert lm("import", "--source", "out", "--output", "back.ckpt", "--json")[0] == 0
    data = ("--data.init_args.corpus", "text.txt", "--data.init_args.batch_size", 4)
    for command in (("sample", "--max_new_tokens", 20), ("validate", *data, "--json")):
        one, other = (lm(*command, "--ckpt_path", path)[1] for path in (last, "back.ckpt"))
        if command[0] == "validate":
            one, other = (json.loads(each) | {"step": 0} for each in (one, other))
        assert one == other and one
    tuned = ("fit", "--config", "tiny.yaml", "--name", "tuned", "--init_from", "back.ckpt")
    code, _, err = lm(*tuned, "--data.init_args.tokenizer", "inherit")
    assert code == 0, err


REFUSED = {
    "qk_norm": ({**SMALL, "qk_norm": True}, "neither gpt2 nor llama holds qk_norm true"),
    "shift": ({**SMALL, "token_shift": True}, "neither gpt2 nor llama holds token_shift true"),
    "cap": ({**SMALL, **TODAY, "logit_soft_cap": 30.0}, "neither gpt2 nor llama holds logit_soft_cap 30.0"),
    "documents": ({**SMALL, "document_end": 3}, "neither gpt2 nor llama holds document_end 3"),
    "post": ({**SMALL, "norm_position": "post"}, "neither gpt2 nor llama holds norm_position post"),
    "head": ({**SMALL, "head_bias": True}, "neither gpt2 nor llama holds head_bias true"),
    "separate": ({**SMALL, "attention": "separate"}, "neither gpt2 nor llama holds attention separate"),
    "projection": ({**SMALL, "projection": False}, "neither gpt2 nor llama holds projection false"),
    "residual": ({**SMALL, "residual": False}, "neither gpt2 nor llama holds residual false"),
    "none": ({**SMALL, "norm": "none"}, "neither gpt2 nor llama holds norm none"),
    "single": ({**SMALL, "feed_forward": "single"}, "neither gpt2 nor llama holds feed_forward single"),
    "positions": ({**SMALL, "positions": "none"}, "neither gpt2 nor llama holds positions none"),
    "mixed": (
        {**SMALL, "positions": "rotary", "n_kv_head": 2},
        "gpt2 does not hold positions rotary, n_kv_head 2; llama does not hold norm layer, feed_forward gelu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_neither_holds_is_named(lm: Run, case: str) -> None:
    settings, expected = REFUSED[case]
    written(Path("a.ckpt"), settings)
    code, _, err = lm("export", "--ckpt_path", "a.ckpt", "--format", "hf", "--output", "out")
    assert code == 2 and err == f"error: checkpoint a.ckpt: {expected}: export it as safetensors\n"
    assert not Path("out").exists()


def test_every_setting_is_held_or_refused() -> None:
    """A new setting of GPT has to be entered in a layout, unless it is written elsewhere or computes nothing."""
    checked = {*COMMON, *(name for layout in LAYOUTS.values() for name in layout.holds(SMALL))}
    written = {"vocab_size", "block_size", "hidden_size", "norm_eps", "rope_theta", "tie_weights", *SMALL, *UNPLACED}
    assert set(inspect.signature(GPT).parameters) == checked | written | {"init_std", "base_width"}


def test_another_network_is_refused(lm: Run) -> None:
    written(Path("a.ckpt"), SMALL)
    saved = checkpoint.load(Path("a.ckpt"))
    saved["lm"]["config"]["model"]["init_args"]["net"]["class_path"] = "lm.models.MLP"
    checkpoint.write(saved, Path("a.ckpt"))
    code, _, err = lm("export", "--ckpt_path", "a.ckpt", "--format", "hf", "--output", "out")
    assert code == 2 and "its network is lm.models.MLP, and gpt2 and llama hold lm.models.GPT alone" in err
    assert len(err.splitlines()) == 1
