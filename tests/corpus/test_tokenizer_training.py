"""`lm tokenizer`: what it writes, tiktoken opens and encodes as the library that trained it would."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer, models, pre_tokenizers

from lm import tokenizers
from lm.corpus.tokenizer_training import SHORT, byte_table
from lm.data import TextData
from lm.errors import UserError
from lm.tokenizers.published import GPT2_PATTERN
from tests.support.samples import random_text

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(workplace: Path, lm: Run) -> tuple[Path, dict]:
    (workplace / "more.txt").write_text(random_text(1, 5000))
    code, out, _ = lm("tokenizer", "--source", "text.txt", "more.txt", "--vocab_size", 500, "--output", "a.tiktoken",
                      "--json")  # fmt: skip
    assert code == 0
    return workplace / "a.tiktoken", json.loads(out.splitlines()[-1])


def test_tiktoken_opens_it_with_equal_encodings(trained: tuple[Path, dict], workplace: Path) -> None:
    path, said = trained
    ranks = load_tiktoken_bpe(str(path))
    assert said["vocab_size"] == len(ranks) == 500
    theirs = tiktoken.Encoding("a", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = tokenizers.make(str(path), str)
    assert (ours.n_vocab, ours.eot) == (501, 500)
    character = {byte: c for c, byte in byte_table().items()}
    vocabulary = {"".join(character[byte] for byte in token): rank for token, rank in ranks.items()}
    corpus = (workplace / "text.txt").read_text()
    for text in (corpus, random_text(2, 5000), " a  b\n\n\tc   <|endoftext|>"):
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
    count = len(ours.encode(corpus)) + len(ours.encode((workplace / "more.txt").read_text()))
    size = (workplace / "text.txt").stat().st_size + (workplace / "more.txt").stat().st_size
    assert said["bytes_per_token"] == pytest.approx(size / count, abs=1e-4)
    assert set(vocabulary.values()) == set(range(500))


def test_it_encodes_as_the_library_that_trained_it(reference: Path, tmp_path: Path) -> None:
    from tokenizers import trainers

    from lm.corpus import formats
    from lm.corpus.tokenizer_training import train

    source = reference / "tinyshakespeare.txt"
    train([str(source)], 2000, tmp_path / "a.tiktoken", formats.Settings())
    ours = tokenizers.make(str(tmp_path / "a.tiktoken"), str)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(source.read_text().splitlines(keepends=True), trainer)
    text = source.read_text()[:100_000]
    assert ours.encode(text).tolist() == library.encode(text).ids


def test_short_pieces_are_the_text(workplace: Path) -> None:
    for text in (random_text(3, 9000), "x" * 20_001, "ab c\ndef\n" * 3000, ""):
        assert "".join(SHORT.findall(text)) == text


def test_a_network_trains_on_it(trained: tuple[Path, dict], lm: Run) -> None:
    assert lm("prepare", "--source", "text.txt", "--tokenizer", "a.tiktoken", "--output", "out")[0] == 0
    assert lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "out", "--data.init_args.tokenizer",
              "a.tiktoken")[0] == 0  # fmt: skip
    assert lm("sample", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--max_new_tokens", 5)[0] == 0
    data = TextData(corpus="out", tokenizer="byte")
    with pytest.raises(UserError, match="corpus out: was prepared with a tokenizer of 501 ids"):
        data.prepare_data()


def test_its_folder_is_made(lm: Run, workplace: Path) -> None:
    words = ("--source", "text.txt", "--vocab_size", 300)
    assert lm("tokenizer", *words, "--output", "new/folder/a.tiktoken")[0] == 0
    assert (workplace / "new/folder/a.tiktoken").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vocab_size", 100), "--vocab_size is 100: it must be at least 256"),
        (("--vocab_size", 10**6), "--vocab_size 1000000: the source has pairs for"),
        (("--output", "a.json"), "--output a.json: say a name that ends in .tiktoken"),
        (("--output", "text.txt/a.tiktoken"), "--output text.txt/a.tiktoken: "),
        (("--source", "no.txt"), "source no.txt: No such file"),
    ],
)
def test_bad_input(lm: Run, arguments: tuple, message: str) -> None:
    words = {"--source": "text.txt", "--vocab_size": 300, "--output": "a.tiktoken"} | dict([arguments])
    code, _, error = lm("tokenizer", *[word for pair in words.items() for word in pair])
    assert code == 2 and message in error and len(error.splitlines()) == 1
