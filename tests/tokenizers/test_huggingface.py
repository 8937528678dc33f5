"""Chat templates travel with the tokenizer: `tests/checkpoints/test_huggingface.py` has its ids."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.checkpoints import checkpoint, huggingface
from lm.checkpoints.imports import import_any
from lm.checkpoints.restore import load_network
from lm.errors import UserError
from lm.tokenizers import BytePairTokenizer, ByteTokenizer, from_state, identity, to_state
from lm.tokenizers.huggingface import DIGITS_PATTERN, LONGEST_TEMPLATE, of_ranks
from tests.support.exports import SMALL, written

Run = Callable[..., tuple[int, str, str]]
PAIRS = of_ranks(
    {**{bytes([i]): i + 3 for i in range(256)}, b"us": 259, b"er": 260, b"user": 261},
    {"<|begin|>": 0, "<|end|>": 1, "<|pad|>": 2},
    "<|end|>",
    DIGITS_PATTERN,
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}naïve “{{ pad_token }}” 😀{{ unk_token }}{{ odd_token }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": " What is 12 times 12? "}, {"role": "assistant", "content": "144"}]
END: dict[str, Any] = {"content": "<|end|>"}
NAMES = {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", **END}, "pad_token": "<|pad|>"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a text": ({"chat_template": TEMPLATE, **NAMES}, {}),
    "named ones": (
        {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}], **NAMES},
        {},
    ),
    "a file": ({"chat_template": "an older one", **NAMES}, {"chat_template.jinja": TEMPLATE}),
    "tokens in a file": (
        {"chat_template": TEMPLATE},
        {"special_tokens_map.json": json.dumps(NAMES | {"eos_token": END})},
    ),
    "other tokens": ({"chat_template": TEMPLATE, **NAMES, "bos_token": None, "odd_token": "<|begin|>"}, {}),
    "few tokens": ({"chat_template": TEMPLATE, "eos_token": "<|end|>"}, {}),
}


def folder(settings: dict[str, Any], files: dict[str, str], tokenizer: BytePairTokenizer = PAIRS) -> Path:
    """Return an export with other settings and files of its tokenizer."""
    written(Path("a.ckpt"), SMALL, tokenizer, dtype=torch.float32)
    there = huggingface.export_huggingface(Path("a.ckpt"), Path("theirs"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    for name, text in {"tokenizer_config.json": json.dumps(settings), **files}.items():
        (there / name).write_text(text)
    return there


@pytest.mark.parametrize("way", WAYS)
def test_transformers_writes_the_same_conversation(workplace: Path, way: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = pytest.importorskip("transformers", reason="pip install lm[hf]").AutoTokenizer.from_pretrained
    import_any(folder(*WAYS[way]), Path("b.ckpt"))
    for number in "12":
        huggingface.export_huggingface(Path("b.ckpt"), Path(f"out{number}"))
        import_any(Path(f"out{number}"), Path("b.ckpt"), overwrite=True)
    for path in {*Path("out1").iterdir()} - {Path("out1/README.md")}:  # which has the run's name
        assert path.read_bytes() == Path("out2", path.name).read_bytes()
    theirs, ours = load("theirs"), load("out2")
    for prompt in (False, True):
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt) == text
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert "user\nWhat is 12 times 12?<|end|>" in text and load_network(Path("b.ckpt")).tokenizer.eot == 1


def test_gguf_has_it_too(workplace: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install lm[hf]")
    from lm.checkpoints.gguf import export_gguf

    import_any(folder(*WAYS["a text"]), Path("b.ckpt"))
    export_gguf(Path("b.ckpt"), Path("b.gguf"))
    fields = gguf.GGUFReader("b.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")]
    assert ids == [0, 1, 2]
    import_any(Path("b.gguf"), Path("c.ckpt"))
    states = [checkpoint.peek(Path(f"{name}.ckpt")).tokenizer for name in "bc"]
    assert states[0] == states[1] and states[0]["chat"]["bos_token"] == "<|begin|>"


def test_it_stays_with_the_checkpoint(lm: Run) -> None:
    """Through training on text that is tokenized once for all, with and without a template, and a resumed run."""
    folder(*WAYS["a text"])
    assert lm("import", "--source", "theirs", "--output", "b.ckpt")[0] == 0
    recipe = checkpoint.peek(Path("b.ckpt")).config
    assert recipe is not None
    recipe["trainer"] = {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    recipe["data"]["init_args"] |= {"corpus": "text.txt", "tokenizer": "inherit", "block_size": 8}
    Path("tune.yaml").write_text(json.dumps(recipe))
    for origin, run in (("a.ckpt", "plain"), ("b.ckpt", "tuned")):
        assert lm("fit", "--config", "tune.yaml", "--name", run, "--init_from", origin)[0] == 0
    assert (
        lm("fit", "--config", "tune.yaml", "--name", "tuned", "--ckpt_path", "last", "--trainer.max_steps", 3)[0] == 0
    )
    states = [checkpoint.peek(Path(f"checkpoints/{run}/last.ckpt")).tokenizer for run in ("plain", "tuned")]
    assert "chat" not in states[0] and states[1]["chat"]["chat_template"] == TEMPLATE
    assert identity(states[0]) == identity(states[1])


def test_the_same_ids_by_name_keep_it(lm: Run) -> None:
    written(Path("a.ckpt"), {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.2}, ByteTokenizer())
    saved = checkpoint.load(Path("a.ckpt"))
    saved["lm"]["tokenizer"]["chat"] = {"chat_template": "hello"}
    checkpoint.write(saved, Path("a.ckpt"))
    words = ("fit", "--config", "tiny.yaml", "--data.init_args.tokenizer", "byte")
    assert lm(*words, "--init_from", "a.ckpt", "--trainer.max_steps", 1)[0] == 0
    assert lm(*words, "--ckpt_path", "last", "--trainer.max_steps", 2)[0] == 0
    assert checkpoint.peek(Path("checkpoints/tiny/last.ckpt")).tokenizer["chat"] == {"chat_template": "hello"}
    assert "chat" not in to_state(from_state({"kind": "byte"}))


ODD: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "long": (
        {"chat_template": "x" * (LONGEST_TEMPLATE + 1)},
        {},
        "its chat_template and its tokens have 262,152 bytes, and lm keeps",
    ),
    "a long file": ({}, {"chat_template.jinja": "x" * 10**6}, "have 1,000,007 bytes, and lm keeps 262,144"),
    "a long token": (
        {"chat_template": "", "eos_token": "x" * 10**6},
        {},
        "its chat_template and its tokens have 1,000,000 bytes",
    ),
    "a number": ({"chat_template": 7}, {}, "its chat_template is no text (AttributeError)"),
    "half a character": ({"chat_template": "\ud800"}, {}, "its chat_template is no text (UnicodeEncodeError)"),
    "unnamed": ({"chat_template": [{"template": "x"}]}, {}, "is none of Hugging Face's (KeyError"),
    "numbers": ({"chat_template": [3]}, {}, "is none of Hugging Face's (TypeError"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_template_is_refused_in_a_line(lm: Run, case: str) -> None:
    settings, files, expected = ODD[case]
    folder({"eos_token": "<|end|>", **settings}, files)
    code, _, err = lm("import", "--source", "theirs", "--output", "b.ckpt")
    assert code == 2 and expected in err and len(err.splitlines()) == 1 and len(err) < 300, err


def test_it_is_never_run(workplace: Path) -> None:
    import_any(folder({"chat_template": "{% for i in range(10**12) %}{{ 1/0 }}{% endfor %}{{"}, {}), Path("b.ckpt"))
    huggingface.export_huggingface(Path("b.ckpt"), Path("out"))
    with pytest.raises(UserError, match="out: it is there already"):
        huggingface.export_huggingface(Path("b.ckpt"), Path("out"))
