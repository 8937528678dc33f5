import base64
import hashlib
import json
import random
import shutil
import socket
from pathlib import Path

import pytest

from lm.data import files, tokenizers
from lm.data.tokenizers import BytePairTokenizer, CharTokenizer
from lm.errors import UserError

BYTES = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))


def random_text(seed: int, size: int = 300) -> str:
    draw = random.Random(seed)
    points = (
        draw.choice((draw.randrange(128), draw.randrange(0x250), draw.randrange(0x1F600, 0x1F650))) for _ in range(size)
    )
    return "".join(map(chr, points))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["char", "bytes", "gpt2"])
def test_round_trip_of_random_unicode(kind: str, seed: int, request: pytest.FixtureRequest) -> None:
    text = random_text(seed) + "<|endoftext|>"
    if kind == "gpt2":
        request.getfixturevalue("reference")
        tokenizer: tokenizers.Tokenizer = BytePairTokenizer(tokenizers.gpt2_ranks())
    else:
        tokenizer = CharTokenizer(text) if kind == "char" else BytePairTokenizer(BYTES)
    again = tokenizers.from_state(json.loads(json.dumps(tokenizer.state())))
    ids = tokenizer.encode(text)
    assert ids.max() < tokenizer.n_vocab
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == again.decode(again.encode(text)) == text
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
    shutil.copy(reference / "gpt2.tiktoken", tmp_path / hashlib.sha1(tokenizers.RANKS_URL.encode()).hexdigest())
    monkeypatch.setenv("LM_DATA_HOME", str(tmp_path / "nothing"))  # so the ranks come from tiktoken's cache
    text = random_text(9, 2000)
    assert tokenizers.make("gpt2", str).encode(text).tolist() == tiktoken.get_encoding("r50k_base").encode_ordinary(
        text
    )


def test_unknown_symbols_are_named() -> None:
    with pytest.raises(UserError, match="3 characters lacks '!', 'ö'"):
        CharTokenizer("abc").encode("aö!b")


@pytest.mark.parametrize("ranks", ["", "no base64\n", "YQ== 1\n", "YQ== x\n"])
def test_a_file_that_is_no_tiktoken_file_is_refused(ranks: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.tiktoken"
    path.write_text(ranks)
    with pytest.raises(UserError, match="not a .tiktoken file"):
        tokenizers.make(str(path), str).encode("a")


def test_a_server_that_never_answers_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        monkeypatch.setenv("LM_DATA_HOME", str(tmp_path))
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(files, "TIMEOUT", 0.2)
        monkeypatch.setattr(tokenizers, "RANKS_URL", f"http://127.0.0.1:{server.getsockname()[1]}/ranks")
        with pytest.raises(UserError, match=r"gpt2.tiktoken is not in .* python-docs needs no network"):
            tokenizers.make("gpt2", str)
    assert not list(tmp_path.iterdir())
