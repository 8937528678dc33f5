"""`lm prepare`: real files, real processes, real kills and a real full disk."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import storage, tokenizers
from lm.corpus import formats, shards, verification
from lm.corpus.formats import zstd
from lm.corpus.prepare import Preparation, prepare
from lm.corpus.shard_writer import ShardWriter
from lm.data.examples import Running
from lm.errors import UserError
from tests.conftest import start
from tests.support.cases import often

Run = Callable[..., tuple[int, str, str]]


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdé \n", k=draw.randrange(1, 9))) for _ in range(count))


def write_documents(folder: Path, count: int = 300) -> Path:
    folder.mkdir()
    for k in range(3):
        lines = [json.dumps({"text": words(seed, 20)}) for seed in range(k, count, 3)]
        (folder / f"{k}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "long.txt").write_text(words(-1, 500))
    (folder / "empty.txt").write_text("")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def texts(folder: Path, split: str) -> list[str]:
    corpus = shards.open_corpus(folder)
    tokens = corpus.splits[split]
    starts = tokens.starts(0, tokens.documents + 1).tolist()
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(starts)]


def test_documents_come_back_whole_ended_and_on_one_side(workplace: Path, lm: Run) -> None:
    write_documents(workplace / "docs")
    (workplace / "docs" / "again.jsonl").write_text((workplace / "docs" / "1.jsonl").read_text())
    code, out, _ = lm("prepare", "--source", "docs", "--tokenizer", "byte", "--output", "out", "--json",
                      "--val_fraction", 0.2, "--test_fraction", 0.1, "--shard_tokens", 5000)  # fmt: skip
    assert code == 0
    found = {split: texts(workplace / "out", split) for split in shards.SPLITS}
    said = [words(seed, 20) for seed in range(300)] + [words(seed, 20) for seed in range(1, 300, 3)] + [words(-1, 500)]
    assert sorted(itertools.chain(*found.values())) == sorted(said)
    assert not set(found["val"]) & set(found["train"]) and not set(found["test"]) & set(found["train"])
    assert 0.1 < len(found["val"]) / 400 < 0.3
    corpus, result = shards.verify(workplace / "out"), json.loads(out.splitlines()[-1])
    assert all((tokens[len(tokens) - 1 :] == 256).all() for tokens in corpus.splits.values())
    assert result == {"tokens": sum(map(len, corpus.splits.values())), "documents": 401, "replaced": 0,
                      "bytes": sum(len(t.encode()) for t in said), "seconds": result["seconds"],
                      "shards": sum(len(t.shards) for t in corpus.splits.values())}  # fmt: skip
    assert result["tokens"] == result["bytes"] + result["documents"]


def test_workers_and_file_order_change_nothing(workplace: Path) -> None:
    write_documents(workplace / "docs", 5000)
    made = []
    for workers in (1, 2, 8):
        prepare(Preparation([str(workplace / "docs")], "byte", workplace / f"out{workers}", workers=workers))
        made.append(contents(workplace / f"out{workers}"))
    assert made[0] == made[1] == made[2]
    backwards = sorted(map(str, (workplace / "docs").glob("*.*")), reverse=True)
    prepare(Preparation(backwards, "byte", workplace / "backwards", workers=1))
    assert set(texts(workplace / "backwards", "val")) == set(texts(workplace / "out1", "val"))


def test_one_process_prepares_a_folder_twice_with_different_tokenizers(workplace: Path) -> None:
    for tokenizer in ("byte", "char"):
        shutil.rmtree(workplace / "out", ignore_errors=True)
        prepare(Preparation(["text.txt"], tokenizer, workplace / "out", workers=1))
        corpus = shards.open_corpus(workplace / "out")
        found = corpus.tokenizer.decode(np.append(corpus.splits["train"][:], corpus.splits["val"][:]))
        assert found == (workplace / "text.txt").read_text()


def test_a_special_tokens_name_in_a_text_is_text(workplace: Path, reference: Path) -> None:
    (workplace / "a.jsonl").write_text(json.dumps({"text": "one <|endoftext|> two"}))
    prepare(Preparation([str(workplace / "a.jsonl")], "gpt2", workplace / "out", val_fraction=0))
    ids = shards.open_corpus(workplace / "out").splits["train"][:].tolist()
    assert ids.count(50256) == 1 and ids[-1] == 50256 and len(ids) > 5


def test_one_text_is_cut_by_characters(workplace: Path, reference: Path) -> None:
    job = Preparation([str(reference / "tinyshakespeare.txt")], "gpt2", workplace / "out")
    prepare(job)
    splits = shards.open_corpus(workplace / "out").splits
    assert {split: len(tokens) for split, tokens in splits.items()} == {"train": 301_966, "val": 36_059, "test": 0}


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_a_long_text_gives_the_tokens_of_the_whole(workplace: Path, reference: Path, tokenizer: str) -> None:
    text = (reference / "tinyshakespeare.txt").read_text() * 3
    (workplace / "long.txt").write_text(text)
    kind = tokenizers.make(tokenizer, lambda: text, documents=True)
    for split in ("documents", "characters"):
        prepare(Preparation([str(workplace / "long.txt")], tokenizer, workplace / split, split=split))  # type: ignore
    splits = shards.open_corpus(workplace / "documents").splits.values()
    whole = np.concatenate([tokens[:] for tokens in splits])
    assert whole.tolist() == [*kind.encode(text).tolist(), kind.eot]
    cut = int(len(text) * 0.9)
    halves = shards.open_corpus(workplace / "characters").splits
    assert halves["train"][:].tolist() == kind.encode(text[:cut]).tolist()
    assert halves["val"][:].tolist() == kind.encode(text[cut:]).tolist()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}


@pytest.mark.parametrize("packed", COMPRESS)
def test_every_format_compressed_or_not_gives_the_same(workplace: Path, packed: str) -> None:
    import pyarrow
    import pyarrow.parquet

    said = [words(seed, 30) for seed in range(40)]
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(40), "body": said}), parquet)
    lines = "".join(json.dumps({"body": text}) + "\n\n" for text in said)
    for name, data in {"a.jsonl": lines.encode(), "a.parquet": parquet.getvalue()}.items():
        (workplace / (name + packed)).write_bytes(COMPRESS[packed](data))
        job = Preparation(
            [name + packed], "byte", workplace / f"out-{name}", reading=formats.Settings("body"), workers=1
        )
        prepare(job)
    assert texts(workplace / "out-a.jsonl", "train") == texts(workplace / "out-a.parquet", "train") != []


def test_standard_input(workplace: Path) -> None:
    command = ["prepare", "--source", "-", "--tokenizer", "byte", "--output", "out"]
    process = start(*command, cwd=workplace, stdin=subprocess.PIPE)
    process.communicate((workplace / "text.txt").read_text(), timeout=60)
    assert process.returncode == 0
    splits = shards.open_corpus(workplace / "out").splits
    assert (
        b"".join(splits[s][:].astype("u1").tobytes() for s in ("train", "val")) == (workplace / "text.txt").read_bytes()
    )
    assert not list((workplace / "out").glob("*spool*"))


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_gives_the_same_bytes(workplace: Path, wanted: int) -> None:
    write_documents(workplace / "docs", 6000)
    (workplace / "docs" / "wrong.txt").write_bytes(b"a\xffb" * 400_000)  # long, and with bytes to be replaced
    program = (
        "import sys\nfrom pathlib import Path\nfrom lm.corpus import formats, prepare\nprepare.COMMIT_SECONDS = 0\n"
        "formats.PIECE = 1 << 14\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare(prepare.Preparation(['docs'], 'byte', Path(sys.argv[1]), shard_tokens=40_000, workers=2,\n"
        "                                        reading=formats.Settings(errors='replace')))\n"
    )
    (workplace / "run.py").write_text(program)

    def run(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "run.py", output], cwd=workplace, stderr=subprocess.PIPE)

    began = time.monotonic()
    assert run("whole").wait(timeout=120) == 0
    took = time.monotonic() - began
    draw, kills, gone_on_from = random.Random(0), 0, set()
    while kills < wanted:
        process = run("broken")
        try:
            _, error = process.communicate(timeout=draw.uniform(0.3, 1) * took)
            assert process.returncode == 0, error
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            with contextlib.suppress(FileNotFoundError):
                progress = json.loads((workplace / "broken" / "progress.json").read_text())
                gone_on_from.add(progress.get("committed", {}).get("tokens", {}).get("train", 0))
        if (workplace / "broken" / "manifest.json").exists():  # it was done, so once more from the start
            assert run("broken").wait(timeout=120) == 0  # and clears away what it was killed before doing
            assert contents(workplace / "whole") == contents(workplace / "broken")
            shutil.rmtree(workplace / "broken")
    assert run("broken").wait(timeout=120) == 0
    assert len(gone_on_from) > wanted // 10  # the kills met it in the middle; on a busy machine, often at one place
    assert contents(workplace / "whole") == contents(workplace / "broken")
    assert shards.verify(workplace / "broken").manifest["replaced"] == 400_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents that take a second, and what is made of them."""
    folder = tmp_path_factory.mktemp("many")
    write_documents(folder / "docs", 30_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(Preparation(["docs"], "byte", folder / "whole"))
    return folder


@pytest.mark.parametrize(("signum", "code"), often([(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]))
def test_a_signal_stops_it_in_one_line_and_it_goes_on(workplace: Path, many: Path, signum: int, code: int) -> None:
    shutil.copytree(many / "docs", workplace / "docs")
    command = ("prepare", "--source", "docs", "--tokenizer", "byte", "--output", "out", "--workers", 2)
    process = start(*command, cwd=workplace)
    while not (workplace / "out" / "progress.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (code, f"stopped by {signal.Signals(signum).name}\n")
    process = start(*command, cwd=workplace)
    process.communicate(timeout=60)
    assert contents(workplace / "out") == contents(many / "whole")


def test_killed_while_finishing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(workplace / "docs")
    prepare(Preparation(["docs"], "byte", workplace / "whole", workers=1))
    name = ShardWriter._name

    def stop(writer: ShardWriter, split: str, *more: int) -> None:
        name(writer, split, *more)
        if split == "val":
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "_name", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(Preparation(["docs"], "byte", workplace / "out", workers=1))
    monkeypatch.setattr(ShardWriter, "_name", name)
    assert (workplace / "out" / "val-00000.tokens").exists()
    prepare(Preparation(["docs"], "byte", workplace / "out", workers=1))
    assert contents(workplace / "out") == contents(workplace / "whole")


def test_a_finished_corpus_is_left_as_it_is(workplace: Path, lm: Run) -> None:
    command = ("prepare", "--source", "text.txt", "--tokenizer", "char", "--output", "out", "--json")
    first, before = lm(*command), contents(workplace / "out")
    again = lm(*command)
    first_said, said = json.loads(first[1]), json.loads(again[1])
    assert first_said | {"seconds": 0} == said | {"seconds": 0}
    assert contents(workplace / "out") == before


def test_a_full_disk_is_one_line_and_goes_on_after(workplace: Path, lm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(workplace / "docs", 3000)
    command = ("prepare", "--source", "docs", "--tokenizer", "byte", "--output", "out", "--workers", 1)
    limited = ["bash", "-c", f"ulimit -f 100; trap '' XFSZ; exec {sys.executable} -m lm " + " ".join(map(str, command))]
    process = subprocess.run(limited, cwd=workplace, capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert process.returncode == 2
    assert "could not be written" in process.stderr and "Traceback" not in process.stderr
    assert not (workplace / "out" / "manifest.json").exists()
    assert lm(*command)[0] == 0
    prepare(Preparation(["docs"], "byte", workplace / "whole", workers=1))
    assert contents(workplace / "out") == contents(workplace / "whole")


def test_progress_is_lines_where_there_is_no_terminal(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(workplace / "docs", 3000)
    prepare(Preparation(["docs"], "byte", workplace / "quiet", workers=1))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("lm.corpus.prepare.LINE_SECONDS", 0.0)
    monkeypatch.setattr("lm.corpus.prepare.BATCH_PIECES", 100)
    prepare(Preparation(["docs"], "byte", workplace / "out", workers=1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5 and all(re.search(r"preparing: .*k/601k.*<.*B/s, .* tokens/s", line) for line in lines)


def test_two_at_once_are_refused(workplace: Path) -> None:
    import fcntl

    (workplace / "out").mkdir()
    descriptor = os.open(workplace / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another lm prepare"):
        prepare(Preparation(["text.txt"], "char", workplace / "out"))
    os.close(descriptor)


BAD: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "empty": (lambda p: (p / "a.txt").write_text(""), ["--source", "a.txt"], "empty"),
    "nothing matches": (lambda p: None, ["--source", "*.nothing"], r"source \*.nothing: no file matches"),
    "no file": (lambda p: None, ["--source", "a.txt"], "a.txt: No such file"),
    "folder without text": (lambda p: (p / "d").mkdir(), ["--source", "d"], "source d: no file matches"),
    "not utf-8": (lambda p: (p / "a.txt").write_bytes(b"ab\xe2\x82" + b"c" * 9), ["--source", "a.txt"],
                  "a.txt: not UTF-8: byte 0xe2 at offset 2"),
    "not utf-8 far in": (lambda p: (p / "a.txt").write_bytes(b"a" * (formats.BLOCK - 1) + "é".encode() + b"\xff"),
                         ["--source", "a.txt"], f"byte 0xff at offset {formats.BLOCK + 1}"),
    "no key": (lambda p: (p / "a.jsonl").write_text('{"text": "a"}\n\n{"body": "b"}\n'), ["--source", "a.jsonl"],
               "a.jsonl, line 3: expected a JSON object"),
    "cut gz": (lambda p: (p / "a.txt.gz").write_bytes(gzip.compress(os.urandom(9999))[:5000]),
               ["--source", "a.txt.gz"], "a.txt.gz: its compressed data is damaged or cut short|not UTF-8"),
    "cut gz of text": (lambda p: (p / "a.txt.gz").write_bytes(gzip.compress(words(1, 9999).encode())[:5000]),
                       ["--source", "a.txt.gz"], "a.txt.gz: its compressed data is damaged or cut short"),
    "cut zst": (lambda p: (p / "a.txt.zst").write_bytes(zstd.compress(words(1, 9999).encode())[:5000]),
                ["--source", "a.txt.zst"], "a.txt.zst: its compressed data is damaged or cut short"),
    "loop": (lambda p: (p / "a").symlink_to(p / "a"), ["--source", "a"], "a: a loop of symbolic links"),
    "folder loop": (lambda p: [(p / "d").mkdir(), (p / "d" / "e").symlink_to(p / "d")], ["--source", "d"],
                    "a loop of symbolic links"),
    "no tokenizer": (lambda p: None, ["--source", "text.txt", "--tokenizer", "gpt9"], "tokenizer gpt9: neither"),
    "dtype": (lambda p: write_big_ranks(p / "b.tiktoken"),
              ["--source", "text.txt", "--tokenizer", "b.tiktoken", "--dtype", "uint16"], "--dtype uint16: too small"),
    "other corpus": (lambda p: prepare(Preparation([str(p / "text.txt")], "char", p / "out", val_fraction=0.3)),
                     ["--source", "text.txt"], "--output out: holds another corpus"),
    "other files": (lambda p: [(p / "out").mkdir(), (p / "out" / "thesis.tex").write_text("")],
                    ["--source", "text.txt"], r"holds other files \(thesis.tex\)"),
    "shares": (lambda p: None, ["--source", "text.txt", "--val_fraction", "1"], "--val_fraction is 1: it must be"),
    "no source": (lambda p: None, [], "--source is missing"),
}  # fmt: skip


def write_big_ranks(path: Path) -> None:
    from lm.tokenizers.merges import to_text

    ranks = {bytes([i]): i for i in range(256)}
    for i in range(256):
        for j in range(256):
            ranks[bytes([i, j])] = len(ranks)
    path.write_text(to_text(ranks))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, workplace: Path, lm: Run) -> None:
    make, arguments, message = BAD[case]
    make(workplace)
    if "--tokenizer" not in arguments:
        arguments = [*arguments, "--tokenizer", "char" if case == "other corpus" else "byte"]
    code, _, error = lm("prepare", "--output", "out", *arguments)
    assert code == 2
    assert len(error.splitlines()) == 1 and error.startswith("error: ")
    assert re.search(message, error), error
    if case != "other corpus":
        assert not (workplace / "out" / "manifest.json").exists()


def test_a_parquet_file_without_the_column(workplace: Path, lm: Run) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), workplace / "a.parquet")
    for key, message in {"text": 'no column "text"; it has id, body', "id": "has int, not text"}.items():
        code, _, error = lm(
            "prepare", "--source", "a.parquet", "--tokenizer", "byte", "--output", key, "--text_key", key
        )
        assert code == 2 and message in error
    (workplace / "cut.parquet").write_bytes((workplace / "a.parquet").read_bytes()[:-9])
    code, _, error = lm("prepare", "--source", "cut.parquet", "--tokenizer", "byte", "--output", "x")
    assert code == 2 and "not a whole Parquet file" in error


def test_wrong_bytes_are_replaced_and_counted(workplace: Path, lm: Run) -> None:
    (workplace / "a.txt").write_bytes("é\ufffd".encode() + b"\xff\xfe" + b"a" * 99)
    (workplace / "b.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "\\ud800"}\n')
    code, out, _ = lm("prepare", "--source", "a.txt", "b.jsonl", "--tokenizer", "byte", "--output", "out",
                      "--errors", "replace", "--json")  # fmt: skip
    assert code == 0 and json.loads(out.splitlines()[-1])["replaced"] == 4


@pytest.fixture
def prepared(workplace: Path) -> Path:
    write_documents(workplace / "docs")
    prepare(Preparation(["docs"], "byte", workplace / "out", shard_tokens=4000, workers=1))
    return workplace / "out"


def test_damaged_shards_are_named(prepared: Path, lm: Run) -> None:
    shard = prepared / "train-00001.tokens"
    good = shard.read_bytes()
    for data, message in {
        good[:-1]: "its header says",
        good[:-99] + bytes([good[-99] ^ 1]) + good[-98:]: "its checksum is wrong",
        good[:20] + b"x" + good[21:]: "its header is damaged",
        b"": "its header is damaged",
    }.items():
        shard.write_bytes(data)
        code, _, error = lm("prepare", "--verify", prepared)
        assert code == 2 and "train-00001.tokens" in error and message in error
    shard.unlink()
    assert "train-00001.tokens: No such file" in lm("prepare", "--verify", "--output", prepared)[2]
    shard.write_bytes((prepared / "train-00000.tokens").read_bytes())
    assert "not the one of" in lm("prepare", "--verify", prepared)[2]
    shard.write_bytes(good)
    assert lm("prepare", "--verify", prepared)[0] == 0
    (prepared / "tokenizer.json").write_text(json.dumps(tokenizers.CharTokenizer("ab").state()))
    assert "not the tokenizer" in lm("prepare", "--verify", prepared)[2]


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10**6), new=st.binary(max_size=12), drop=st.integers(0, 12), which=st.integers(0, 2))
def test_fuzzed_files_give_errors_and_never_other_tokens(
    fuzzed: tuple[Path, list[int]], at: int, new: bytes, drop: int, which: int
) -> None:
    folder, tokens = fuzzed
    path = folder / ("train-00000.tokens", "manifest.json", "tokenizer.json")[which]
    good = path.read_bytes()
    at %= len(good)
    path.write_bytes(good[:at] + new + good[at + drop :])
    with contextlib.ExitStack() as mended:
        mended.callback(path.write_bytes, good)
        found = tokens
        with contextlib.suppress(UserError):
            found = shards.verify(folder).splits["train"][:].tolist()
        assert found == tokens


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "text.txt").write_text(words(3, 60))
    prepare(Preparation([str(folder / "text.txt")], "byte", folder / "out", workers=1))
    return folder / "out", shards.open_corpus(folder / "out").splits["train"][:].tolist()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_slices_over_shards_are_slices_of_the_whole(prepared_once: Path, data: st.DataObject) -> None:
    tokens = shards.open_corpus(prepared_once).splits["train"]
    whole = np.concatenate([np.fromfile(path, "<u2", header.tokens, offset=128) for path, header, _ in tokens.shards])
    a, b = (data.draw(st.integers(-3, len(whole) + 3)) for _ in range(2))
    assert np.array_equal(tokens[a:b], whole[a:b])
    c, d = sorted(data.draw(st.integers(0, tokens.documents + 1)) for _ in range(2))
    starts = np.append(0, np.flatnonzero(whole == 256) + 1)
    assert np.array_equal(tokens.starts(c, d), starts[c:d])


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    write_documents(folder / "docs")
    prepare(Preparation([str(folder / "docs")], "byte", folder / "out", shard_tokens=4000, workers=1))
    return folder / "out"


def resident() -> int:
    """Bytes of this process in memory, mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_ten_billion_tokens_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "check", lambda path, header: None)  # 20 GB of holes take a minute to read
    tokenizer = tokenizers.ByteTokenizer()
    writer = ShardWriter(tmp_path, tokenizer, 10**9)
    tokenizer_file = json.dumps(tokenizer.state())
    (tmp_path / "tokenizer.json").write_text(tokenizer_file)
    identity = bytes.fromhex(tokenizers.identity(tokenizer.state()))
    for k in range(10):  # sparse files: nothing is on the disk but headers, and the last token
        header = shards.Header(2, 10**9, 0, 257, identity, bytes(32))
        with (tmp_path / f"train-{k:05}.tokens").open("wb") as file:
            file.write(header.pack())
            file.truncate(header.size)
            file.seek(header.size - 2)
            file.write(b"\x07\x00")
    writer.tokens["train"] = 10**10
    writer.finish({"documents": 0, "bytes": 0, "replaced": 0})
    began = time.monotonic()
    tokens = shards.open_corpus(tmp_path).splits["train"]
    took = time.monotonic() - began
    assert len(tokens) == 10**10
    running, before = Running(tokens, 64, "permutation", 1), resident()
    for k in range(500):  # 20 GB are read all over
        running(np.arange(k * 64, (k + 1) * 64))
    assert resident() - before < 10 << 20
    assert tokens[10**10 - 1 :].tolist() == [7] and tokens[10**9 - 1 : 10**9 + 2].tolist() == [7, 0, 0]
    print(f"opened in {took:.4f} s")


@pytest.mark.parametrize("key", ["documents", "bytes", "replaced", "splits", "tokenizer", "version"])
def test_a_wrong_manifest_is_one_line(workplace: Path, lm: Run, key: str) -> None:
    prepare(Preparation(["text.txt"], "byte", workplace / "out", workers=1))
    path = workplace / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    for value in (None, -1, "x", [1], {"train": 1}):
        path.write_text(json.dumps(manifest | {key: value}))
        code, _, error = lm("prepare", "--verify", "out")
        assert code == 2 and len(error.splitlines()) == 1 and ("manifest.json" in error or "tokenizer.json" in error)
    again = lm("fit", "--config", "tiny.yaml", "--data.init_args.corpus", "out")  # by the last of them
    assert (again[0], again[2]) == (code, error)


def test_preparing_needs_no_torch() -> None:
    code = "import sys, lm.cli.prepare, lm.corpus.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    storage.write_whole(tmp_path / "a", b"1")
    storage.write_whole(tmp_path / "a", b"2")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"2")]
