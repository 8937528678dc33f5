import ast
import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lm import storage, tokenizers
from lm.errors import UserError
from lm.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, merges
from lm.tokenizers.published import PUBLISHED
from tests.conftest import ROOT
from tests.support.samples import BYTES, random_text


def test_the_package_names_what_its_files_define_and_imports_nothing_heavy() -> None:
    package = ast.parse(Path(tokenizers.__file__).read_text())
    assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in package.body)
    assert set(tokenizers.__all__) >= {"Tokenizer", "CharTokenizer", "ByteTokenizer", "BytePairTokenizer", "from_state"}
    code = "import sys, lm.tokenizers; print(*{'torch', 'tiktoken', 'tokenizers', 'lightning'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "\n"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["char", "char with end of text", "byte", "bytes as pairs", "gpt2", "gaps"])
def test_round_trip_of_random_unicode(kind: str, seed: int, request: pytest.FixtureRequest) -> None:
    text = random_text(seed) + "<|endoftext|>"
    if kind == "gpt2":
        request.getfixturevalue("reference")
    make: dict[str, Callable[[], tokenizers.Tokenizer]] = {
        "char": lambda: CharTokenizer(text),
        "char with end of text": lambda: CharTokenizer(text, end_of_text=True),
        "byte": ByteTokenizer,
        "bytes as pairs": lambda: BytePairTokenizer(BYTES),
        "gpt2": lambda: tokenizers.make("gpt2", str),
        "gaps": lambda: BytePairTokenizer(BYTES, PUBLISHED["o200k_base"].pattern, {"<|endoftext|>": 300, "<|x|>": 310}),
    }
    tokenizer = make[kind]()
    again = tokenizers.from_state(json.loads(json.dumps(tokenizer.state())))
    ids = tokenizer.encode(text)
    assert ids.max() < tokenizer.n_vocab
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == again.decode(again.encode(text)) == text
    decoder = tokenizer.decoder()
    pieces = [decoder.add(i) for i in ids.tolist()]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) + decoder.finish() == text
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.n_vocab
    assert sum(len(table[i]) for i in ids) == len(text.encode())


def test_gpt2_gives_the_published_ids(reference: Path) -> None:
    tokenizer = tokenizers.make("gpt2", str)
    assert tokenizer.encode("hii there").tolist() == [71, 4178, 612]
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)


def test_gpt2_equals_tiktokens_own(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    shutil.copy(reference / "gpt2.tiktoken", tmp_path / hashlib.sha1(PUBLISHED["gpt2"].url.encode()).hexdigest())
    monkeypatch.setenv("LM_DATA_HOME", str(tmp_path / "nothing"))  # so the ranks come from tiktoken's cache
    text = random_text(9, 2000)
    assert tokenizers.make("gpt2", str).encode(text).tolist() == tiktoken.get_encoding("r50k_base").encode_ordinary(
        text
    )


def test_unknown_symbols_are_named() -> None:
    with pytest.raises(UserError, match="3 characters lacks '!', 'ö'"):
        CharTokenizer("abc").encode("aö!b")


@pytest.mark.parametrize("text", ["", "no base64\n", "YQ== 1\n", "YQ== x\n"])
def test_a_file_that_is_no_tiktoken_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.tiktoken"
    path.write_text(text)
    with pytest.raises(UserError, match="not a .tiktoken file"):
        tokenizers.make(str(path), str).encode("a")


def test_a_server_that_never_answers_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        monkeypatch.setenv("LM_DATA_HOME", str(tmp_path))
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(storage, "TIMEOUT", 0.2)
        silent = PUBLISHED["gpt2"]._replace(url=f"http://127.0.0.1:{server.getsockname()[1]}/ranks")
        monkeypatch.setitem(PUBLISHED, "gpt2", silent)
        with pytest.raises(UserError, match=r"gpt2.tiktoken is not in .* python-docs needs no network"):
            tokenizers.make("gpt2", str)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_published_encodings_are_tiktokens_but_for_the_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # their ranks are not at hand: stand-ins under the real patterns and special tokens
    import tiktoken
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: (url, expected_hash))
    theirs, ours = getattr(openai_public, name)(), PUBLISHED[name]
    assert (ours.url, ours.sha256) == theirs["mergeable_ranks"]
    assert (ours.pattern, ours.special) == (theirs["pat_str"], theirs["special_tokens"])
    tokenizer = BytePairTokenizer(BYTES, ours.pattern, ours.special)
    own = tiktoken.Encoding(**theirs | {"mergeable_ranks": merges.from_text(BYTES)})
    text = random_text(1) + "<|endoftext|>"
    assert tokenizer.encode(text).tolist() == own.encode_ordinary(text)
    assert (tokenizer.n_vocab, tokenizer.eot) == (own.n_vocab, own.eot_token)


def test_half_a_character_is_held_back_and_then_said() -> None:
    decoder = ByteTokenizer().decoder()
    assert [decoder.add(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert (decoder.add(0xE2), decoder.finish()) == ("", "\ufffd")


def test_lone_surrogates_are_replaced_or_named() -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800b")) == "a\ufffdb"
    assert BytePairTokenizer(BYTES).decode(BytePairTokenizer(BYTES).encode("a\ud800b")) == "a\ufffdb"
    with pytest.raises(UserError, match="lacks"):
        CharTokenizer("ab").encode("a\ud800b")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "gpt9"}', '{"kind": "char"}', '{"kind": "byte", "x": 1}'])
def test_a_file_that_is_no_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="not a tokenizer"):
        tokenizers.load_tokenizer(tmp_path / "tokenizer.json")


def test_an_id_beyond_the_vocabulary_stands_for_nothing() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([65, tokenizer.n_vocab, 66]) == "AB"
