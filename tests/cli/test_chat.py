"""`lm chat`: turns, what is forgotten, and its errors."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.served import BLOCK, written

Run = Callable[..., tuple[int, str, str]]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation(lm: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(workplace / "tiny.ckpt")
    words = ("chat", "--ckpt_path", "tiny.ckpt", "--temperature", 0, "--max_new_tokens", 5)
    typed(monkeypatch, "hi")
    code, first, err = lm(*words)
    assert (code, err) == (0, "")
    typed(monkeypatch, "hi", "hi", "/new", "hi")
    code, out, _ = lm(*words)
    assert code == 0 and out.startswith(first) and out.endswith(first)
    assert out != first * 3, "the second answer knows of the first turn"
    typed(monkeypatch, *["hello there"] * (BLOCK // 20))  # more than the context holds
    assert lm(*words)[0] == 0
    typed(monkeypatch, "x" * BLOCK)
    code, _, err = lm(*words)
    assert code == 2 and f"the context {BLOCK}" in err


def test_without_a_template(lm: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(workplace / "plain.ckpt", chat=None)
    typed(monkeypatch, "hi")
    code, _, err = lm("chat", "--ckpt_path", "plain.ckpt")
    assert code == 2 and err.startswith("error: --ckpt_path plain.ckpt: it has no chat template")
    (workplace / "own.jinja").write_text("{{ messages[-1].content }}")
    typed(monkeypatch, "hi")
    words = ("--chat_template", "own.jinja", "--max_new_tokens", 3)
    assert lm("chat", "--ckpt_path", "plain.ckpt", *words)[0] == 0
    typed(monkeypatch, "hi")
    (workplace / "own.jinja").write_text("{{ raise_exception('not this one') }}")
    code, _, err = lm("chat", "--ckpt_path", "plain.ckpt", *words)
    assert code == 2 and "not this one" in err and err.count("\n") == 1
