"""What other programs saved is recognised by what is in it; what is none of it ends in one line."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lm.checkpoints import checkpoint, huggingface
from lm.checkpoints.imports import import_any
from lm.checkpoints.restore import load_network
from lm.checkpoints.schema import Saved
from lm.models import GPT
from lm.tokenizers import ByteTokenizer, CharTokenizer
from lm.tokenizers import huggingface as tokenizer_files
from tests.conftest import MISSING, REFERENCE
from tests.support.exports import SMALL, SYMBOLS, TODAY, T, exact, written

Run = Callable[..., tuple[int, str, str]]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def folder(workplace: Path) -> Path:
    """An export as GPT-2."""
    written(Path("a.ckpt"), SMALL, dtype=torch.float32)
    return huggingface.export_huggingface(Path("a.ckpt"), Path("out"))


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def shard(folder: Path, name: str = "part.safetensors") -> dict[str, str]:
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    places = dict.fromkeys(load_file(folder / "part.safetensors"), name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def retype(folder: Path, **values: torch.Tensor | None) -> None:
    """Change tensors; None removes one."""
    found = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in values.items()}
    save_file({name: value for name, value in found.items() if value is not None}, folder / WEIGHTS)


class Code:
    """Its pickle runs code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def as_bin(folder: Path, content: Any) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")


def other_tokenizer(folder: Path, tokenizer: Any) -> None:
    for name, content in tokenizer_files.to_files(tokenizer, T).items():
        (folder / name).write_text(json.dumps(content))


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def lying_header(path: Path) -> None:
    """Say that a tensor has more bytes than the file."""
    header = json.dumps(
        {"transformer.wte.weight": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f / WEIGHTS, 1000), "model.safetensors is damaged, or no safetensors file"),
    "cut in the middle": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size // 2), "model.safetensors i"),
    "empty": (lambda f: os.truncate(f / WEIGHTS, 0), "model.safetensors is damaged, or no safetensors file"),
    "foreign": (lambda f: (f / WEIGHTS).write_bytes(b"GGML" + bytes(4000)), "model.safetensors is damaged, or no safe"),
    "a huge header": (lambda f: huge_header(f / WEIGHTS), "model.safetensors is damaged, or no safetensors file"),
    "more than there is": (lambda f: lying_header(f / WEIGHTS), "model.safetensors is damaged, or no safetensors file"),
    "a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "Is a directory"),
    "a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "a pipe or a device"),
    "a pipe as config": (lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)), "a pipe or a device"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"it has neither {WEIGHTS} nor {WEIGHTS}.index.json, pytorch_mod"),
    "no config": (lambda f: (f / CONFIG).unlink(), "say a folder of lm export, one of Hugging Face's with config.json"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "config.json is no JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[1]"), "config.json is no JSON object"),
    "config is deep": (lambda f: (f / CONFIG).write_text("[" * 10**6), "config.json is no JSON"),
    "config is bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\0"), "config.json is no JSON"),
    "config is huge": (lambda f: os.truncate(f / CONFIG, 1 << 40), "too large for what it should be"),
    "unknown": (lambda f: edit(f / CONFIG, model_type="mamba"), "its model_type is mamba, and lm knows gpt2, llama"),
    "no architecture": (lambda f: edit(f / CONFIG, model_type=None), "its model_type is None, and lm knows gpt2, llam"),
    "mislabelled": (lambda f: edit(f / CONFIG, model_type="llama"), 'num_attention_heads is null: it should be a whol'),
    "a wider one": (
        lambda f: edit(f / CONFIG, n_embd=64),
        "its tensor transformer.wte.weight is (11, 32), and config.json makes it (11, 64)",
    ),
    "more symbols": (
        lambda f: edit(f / CONFIG, vocab_size=12),
        "its tensor transformer.wte.weight is (11, 32), and config.json makes it (12, 32)",
    ),
    "a longer context": (
        lambda f: edit(f / CONFIG, n_positions=1024),
        "its tensor transformer.wpe.weight is (24, 32), and config.json makes it (1024, 32)",
    ),
    "a wider inner layer": (
        lambda f: edit(f / CONFIG, n_inner=100),
        "its tensor transformer.h.0.mlp.c_fc.weight is (32, 128), and config.json makes it (32, 100)",
    ),
    "another layer": (
        lambda f: edit(f / CONFIG, n_layer=3),
        "it has no tensor transformer.h.2.ln_1.weight, which config.json makes (32,)",
    ),
    "a layer less": (lambda f: edit(f / CONFIG, n_layer=1), "its tensor h.1.attn.c_attn.bias has no place in gpt2"),
    "many layers": (lambda f: edit(f / CONFIG, n_layer=10**9), "config.json says 1000000000 layers, and there are 28 "),
    "untied": (lambda f: edit(f / CONFIG, tie_word_embeddings=False), "it has no tensor lm_head.weight, which config"),
    "heads": (lambda f: edit(f / CONFIG, n_head=5), "n_head 5 does not divide n_embd 32"),
    "no heads": (lambda f: edit(f / CONFIG, n_head=0), "config.json: n_head is 0: it should be a whole number, at lea"),
    "a text": (lambda f: edit(f / CONFIG, n_embd="32"), 'config.json: n_embd is "32": it should be a whole number'),
    "half a layer": (lambda f: edit(f / CONFIG, n_layer=1.5), "config.json: n_layer is 1.5: it should be a whole numb"),
    "eps": (lambda f: edit(f / CONFIG, layer_norm_epsilon=-1.0), "norm_eps is -1: it must be above 0"),
    "infinity": (lambda f: edit(f / CONFIG, layer_norm_epsilon=float("inf")), "norm_eps is inf: it must be "),
    "activation": (lambda f: edit(f / CONFIG, activation_function="swish"), "activation_function is swish, and lm's G"),
    "scaling": (lambda f: edit(f / CONFIG, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is"),
    "missing tensor": (
        lambda f: retype(f, transformer__h__1__attn__c_proj__bias=None),
        "it has no tensor transformer.h.1.attn.c_proj.bias, which config.json makes (32,)",
    ),
    "strange tensor": (lambda f: retype(f, adapter=torch.ones(2)), "its tensor adapter has no place in gpt2"),
    "a name that commands the terminal": (
        lambda f: retype(f, **{"a\x1b[31m\x9b0m\n": torch.ones(2)}),
        "its tensor a\\x1b[31m\\x9b0m has no place in gpt2",
    ),
    "no bias that a network can have": (
        lambda f: edit(f / CONFIG, lm={"bias": [1], "attention_bias": None}),
        "config.json: bias is [1]: it should be true or false",
    ),
    "whole numbers": (
        lambda f: retype(f, transformer__ln_f__bias=torch.ones(32, dtype=torch.int8)),
        "its tensor transformer.ln_f.bias is of int8: lm reads float16, bfloat16, float32, float64",
    ),
    "out of the folder": (lambda f: shard(f, "../out/part.safetensors"), "'../out/part.safetensors', which is no file"),
    "an absolute path": (lambda f: shard(f, "/etc/passwd"), "'/etc/passwd', which is no file of the folder"),
    "a name for a shard that no file has": (lambda f: shard(f, "p" * 5000), "File name too long"),
    "no such shard": (lambda f: shard(f, "other.safetensors"), "other.safetensors"),
    "a number as shard": (lambda f: shard(f, 3), "it is damaged (TypeError"),
    "the place of a shard is a pipe": (
        lambda f: (shard(f), (f / "part.safetensors").unlink(), os.mkfifo(f / "part.safetensors")),
        "a pipe or a device",
    ),
    "a link to itself": (lambda f: ((f / CONFIG).unlink(), os.symlink(CONFIG, f / CONFIG)), "symbolic links"),
    "NaN layers": (lambda f: edit(f / CONFIG, n_layer=float("nan")), "config.json: n_layer is NaN: it should be a who"),
    "a number of thousands of digits": (
        lambda f: (f / CONFIG).write_text('{"n_layer": ' + "9" * 5000 + "}"),
        "config.json is no JSON (Exceeds the limit",
    ),
    "a mark of bytes": (
        lambda f: (f / CONFIG).write_bytes(b"\xef\xbb\xbf" + (f / CONFIG).read_bytes()),
        "config.json is no JSON (Unexpected UTF-8 BOM",
    ),
    "a billion channels": (lambda f: edit(f / CONFIG, n_embd=10**9, n_head=1), "no tensor is as large as its sizes"),
    "a key twice": (
        lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"n_layer"', '"n_layer": 3, "n_layer"', 1)
                                          .replace('"n_layer": 2', '"n_layer": 3')),
        "it has no tensor transformer.h.2.ln_1.weight, which config.json makes (32,)",
    ),
    "another head than is tied": (
        lambda f: retype(f, lm_head__weight=torch.ones(11, 32)),
        "its tensor lm_head.weight is another than the embedding, and config.json ties them",
    ),
    "no numbers": (
        lambda f: as_bin(f, load_file(f / WEIGHTS) | {"transformer.wte.weight": torch.ones(11, 32, device="meta")}),
        "its tensor transformer.wte.weight is no plain one",
    ),
    "one number for many": (
        lambda f: (
            edit(f / CONFIG, vocab_size=2**31 - 1),
            as_bin(f, load_file(f / WEIGHTS) | {"transformer.wte.weight": torch.ones(1, 1).expand(2**31 - 1, 32)}),
        ),
        "its tensor transformer.wte.weight is no plain one",
    ),
    "a sparse one": (
        lambda f: as_bin(f, load_file(f / WEIGHTS) | {"transformer.wte.weight": torch.ones(11, 32).to_sparse()}),
        "its tensor transformer.wte.weight is no plain one",
    ),
    "an end that is no text": (
        lambda f: edit(f / "tokenizer_config.json", eos_token=5),
        "its tokenizer cannot be held: its eos_token is 5, which is no text",
    ),
    "an index of nothing": (
        lambda f: (shard(f), (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": []}')),
        "it is damaged (AttributeError",
    ),
    "not in its shard": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text(
            json.dumps({"weight_map": shard(f) | {"lm_head.weight": "part.safetensors"}})
        ),
        "has tensor lm_head.weight in part.safetensors, which does not have it",
    ),
    "code": (lambda f: as_bin(f, {"transformer.wte.weight": Code()}), "has code in it"),
    "a bin of other things": (lambda f: as_bin(f, {"a": 3}), "pytorch_model.bin holds other things than tensors"),
    "a bin of a list": (lambda f: as_bin(f, [torch.ones(1)]), "pytorch_model.bin holds other things than tensors"),
    "a larger tokenizer": (
        lambda f: other_tokenizer(f, ByteTokenizer()),
        "its tokenizer has 257 ids, and the embedding 11 rows: there have to be as many",
    ),
    "a smaller tokenizer": (
        lambda f: other_tokenizer(f, CharTokenizer("abc")),
        "its tokenizer has 3 ids, and the embedding 11 rows: there have to be as many",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer: name the one that it was traine"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("x"), "tokenizer.json is no JSON"),
    "tokenizer without a model": (
        lambda f: edit(f / "tokenizer.json", model=None),
        "its tokenizer.json is none of Hugging Face's (KeyError",
    ),
    "another kind": (
        lambda f: edit(f / "tokenizer.json", model={"type": "Unigram"}),
        "its tokenizer cannot be held: its model is Unigram, and lm holds byte-level BPE",
    ),
    "a normalizer": (
        lambda f: edit(f / "tokenizer.json", normalizer={"type": "NFC"}),
        "its tokenizer cannot be held: its normalizer, NFC, changes texts",
    ),
    "a post-processor": (
        lambda f: edit(
            f / "tokenizer.json",
            post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]},
        ),
        "its tokenizer cannot be held: its post_processor, TemplateProcessing, adds tokens to each text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_line(lm: Run, folder: Path, case: str) -> None:
    harm, expected = BROKEN[case]
    harm(folder)
    code, out, err = lm("import", "--source", "out", "--output", "b.ckpt")
    assert code == 2 and err.startswith("error: --source out: ") and expected in err, err
    assert len(err.splitlines()) == 1 and out == "" and len(err) < 500
    assert not Path("b.ckpt").exists() and not Path("ran").exists()


LLAMA: dict[str, tuple[dict[str, Any], str]] = {
    "head size": ({"head_dim": 16}, "head_dim is 16, and lm's GPT has 8"),
    "long rope": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
        "rope_type is llama3, and lm's GPT has def",
    ),
    "older rope": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
        "rope_type is linear, and",
    ),
    "two ropes, of which transformers takes the older": (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "rope_type is yarn, and lm's GPT has default",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu, and lm's GPT has silu"),
    "key heads": ({"num_key_value_heads": 3}, "n_kv_head 3 does not divide n_head 4"),
    "biases": ({"mlp_bias": True}, "it has no tensor model.layers.0.mlp.gate_proj.bias"),
    "positions": (
        {"max_position_embeddings": 10**12},
        "config.json says 1000000000000 positions, and lm takes 4194304",
    ),
    "keys": (
        {"num_key_value_heads": 4},
        "its tensor model.layers.0.self_attn.k_proj.weight is (16, 32), and config.json makes it (32, 32)",
    ),
}


@pytest.mark.parametrize("case", LLAMA)
def test_what_a_llama_may_not_say(lm: Run, case: str) -> None:
    values, expected = LLAMA[case]
    written(Path("a.ckpt"), {**SMALL, **TODAY, "bias": False, "n_kv_head": 2}, dtype=torch.float32)
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    edit(Path("out/config.json"), **values)
    code, _, err = lm("import", "--source", "out", "--output", "b.ckpt")
    assert code == 2 and expected in err and len(err.splitlines()) == 1, err


def test_an_embedding_may_be_rounded_up(lm: Run) -> None:
    """To a multiple of 64: the tokenizer gets an id that no text has."""
    tokenizer = tokenizer_files.of_ranks(
        {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}, None, tokenizer_files.GPT2_PATTERN
    )
    written(Path("a.ckpt"), SMALL, tokenizer, dtype=torch.float32)
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    wte = load_file("out/model.safetensors")["transformer.wte.weight"]
    retype(Path("out"), transformer__wte__weight=F.pad(wte, (0, 0, 0, 63)))
    edit(Path("out/config.json"), vocab_size=320)
    code, _, err = lm("import", "--source", "out", "--output", "b.ckpt")
    assert code == 0 and "its embedding has 320 rows for 257 ids: the last ones are no token's" in err
    fitted = load_network(Path("b.ckpt"))
    assert fitted.tokenizer.n_vocab == 320 and fitted.tokenizer.encode("ab").tolist() == [97, 98]
    assert lm("sample", "--ckpt_path", "b.ckpt", "--max_new_tokens", 20)[0] == 0


NANO: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "bias": False}


def nanogpt(path: Path, symbols: int, compiled: bool = True, **more: Any) -> GPT:
    """Write what nanoGPT's train.py writes; return the network."""
    torch.manual_seed(1)
    args = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": T,
        "bias": False,
        "vocab_size": symbols,
        "dropout": 0.0,
    }
    net = GPT(symbols, T, n_layer=2, n_head=2, n_embd=16, bias=False, feed_forward="gelu_erf")
    prefix = "_orig_mod." * compiled
    weights = {
        prefix + (name if name == "lm_head.weight" else f"transformer.{name}"): value
        for name, value in net.state_dict().items()
    }
    weights[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()  # of before flash attention
    torch.save(
        {
            "model": weights,
            "optimizer": torch.optim.AdamW(net.parameters()).state_dict(),
            "model_args": args,
            "iter_num": 250,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "mine", "eval_only": False},
            **more,
        },
        path,
    )
    return net


@pytest.mark.parametrize("compiled", [False, True])
def test_nanogpt(lm: Run, compiled: bool) -> None:
    net = nanogpt(Path("ckpt.pt"), len(SYMBOLS), compiled)
    Path("symbols.txt").write_text(SYMBOLS)
    code, _, err = lm("import", "--source", "ckpt.pt", "--output", "b.ckpt")
    assert code == 2 and "ckpt.pt: it has no tokenizer: name the one that it was trained with by --tokenizer" in err
    words = ("import", "--source", "ckpt.pt", "--output", "b.ckpt", "--tokenizer", "char", "--corpus", "symbols.txt")
    code, _, err = lm(*words)
    assert code == 0, err
    tokens = torch.randint(len(SYMBOLS), (2, T))
    assert torch.equal(exact(Path("b.ckpt"))(tokens), net(tokens)) and checkpoint.peek(Path("b.ckpt")).step == 250
    assert lm("sample", "--ckpt_path", "b.ckpt", "--max_new_tokens", 5)[0] == 0


def test_nanogpts_tokenizers_that_it_implies(lm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if MISSING:
        pytest.skip(f"LM_DATA_HOME lacks {', '.join(MISSING)}")
    monkeypatch.setenv("LM_DATA_HOME", str(REFERENCE))
    nanogpt(Path("ckpt.pt"), 65, config={"dataset": "shakespeare_char"})
    assert lm("import", "--source", "ckpt.pt", "--output", "b.ckpt")[0] == 0
    assert load_network(Path("b.ckpt")).tokenizer.state()["kind"] == "char"
    nanogpt(Path("ckpt.pt"), 50304)
    code, _, err = lm("import", "--source", "ckpt.pt", "--output", "b.ckpt", "--overwrite")
    assert code == 0 and "its embedding has 50,304 rows for 50,257 ids" in err
    assert load_network(Path("b.ckpt")).tokenizer.encode("Hello world").tolist() == [15496, 995]


NANOGPT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda p: torch.save({"model": Code(), "model_args": {}}, p), "has code in it"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps(Code())), "has code in it"),
    "text": (lambda p: p.write_text("hello"), "is damaged, has code"),
    "cut": (lambda p: (nanogpt(p, 11), os.truncate(p, 5000)), "ckpt.pt is damaged, has code"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged, has"),
    "another dict": (lambda p: torch.save({"weights": {}}, p), "it is no ckpt.pt of nanoGPT's, which has model and mo"),
    "a list": (lambda p: torch.save([1], p), "it is no ckpt.pt of nanoGPT's"),
    "no width": (
        lambda p: nanogpt(p, 11, model_args={"n_layer": 2, "n_head": 2}),
        "n_embd is null: it should be a whole number, at least 1",
    ),
    "another width": (
        lambda p: nanogpt(p, 11, model_args=NANO | {"n_embd": 32, "block_size": T, "vocab_size": 11}),
        "its tensor transformer.wte.weight is (11, 16), and model_args makes it (11, 32)",
    ),
}


@pytest.mark.parametrize("case", NANOGPT)
def test_a_bad_file_is_one_line(lm: Run, case: str) -> None:
    harm, expected = NANOGPT[case]
    harm(Path("ckpt.pt"))
    code, _, err = lm("import", "--source", "ckpt.pt", "--output", "b.ckpt")
    assert code == 2 and err.startswith("error: --source ckpt.pt: ") and expected in err, err
    assert len(err.splitlines()) == 1 and not Path("b.ckpt").exists() and not Path("ran").exists()


def test_a_folder_begins_a_run_and_its_gradients_agree(lm: Run) -> None:
    """The recipe is the one that the imported checkpoint has."""
    tokenizer = CharTokenizer({*Path("text.txt").read_text()})
    written(Path("a.ckpt"), {**SMALL, **TODAY, "n_kv_head": 2, "norm_eps": 1e-6}, tokenizer, dtype=torch.float32)
    huggingface.export_huggingface(Path("a.ckpt"), Path("out"))
    import_any(Path("out"), Path("b.ckpt"))
    recipe = checkpoint.peek(Path("b.ckpt")).config
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = ("--data.init_args.corpus", "text.txt", "--data.init_args.tokenizer")
    code, out, err = lm("gradients", "--config", "recipe.yaml", *data, "char", "--json")
    assert code == 0 and json.loads(out)["ok"], err
    words = ("fit", "--config", "recipe.yaml", *data, "inherit", "--trainer.max_steps", 1)
    losses = []
    for origin in ("a.ckpt", "b.ckpt", "out"):
        name = ("--name", origin.replace(".", "-"), "--trainer.enable_progress_bar", "false")
        code, out, err = lm(*words, *name, "--init_from", origin, "--json")
        assert code == 0, err
        losses.append(json.loads(out)["loss"])
    assert losses[0] == losses[1] == losses[2]
    (Path("out") / WEIGHTS).unlink()
    code, _, err = lm(*words, "--name", "none", "--init_from", "out")
    assert code == 2 and err.startswith("error: --init_from out: it has neither model.safetensors nor")
    assert len(err.splitlines()) == 1


def test_lms_own_checkpoint_needs_no_import(lm: Run, folder: Path) -> None:
    code, _, err = lm("import", "--source", "a.ckpt", "--output", "b.ckpt")
    assert code == 2 and err == "error: --source a.ckpt: it is a checkpoint of lm's already: use it as it is\n"


def test_no_bias_comes_back_that_was_trained_elsewhere(folder: Path) -> None:
    """The export says that the network had no biases; if they are not zero any more, they are its own."""
    written(Path("c.ckpt"), {**SMALL, "bias": False}, dtype=torch.float32)
    huggingface.export_huggingface(Path("c.ckpt"), Path("bare"))
    import_any(Path("bare"), Path("d.ckpt"))
    assert Saved.of(checkpoint.load(Path("d.ckpt"))).net["init_args"]["bias"] is False
    retype(Path("bare"), transformer__ln_f__bias=torch.ones(32))
    import_any(Path("bare"), Path("e.ckpt"))
    assert Saved.of(checkpoint.load(Path("e.ckpt"))).net["init_args"].get("bias", True) is True


def test_a_number_that_is_not_finite_is_noted(lm: Run, folder: Path) -> None:
    retype(folder, transformer__ln_f__bias=torch.full((32,), float("nan")))
    code, _, err = lm("import", "--source", "out", "--output", "b.ckpt")
    assert code == 0 and "out: ln_f.bias is not finite" in err
