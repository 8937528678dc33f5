import gzip
import json
from pathlib import Path

import pytest

from lm.corpus import columns
from lm.errors import UserError

NAMES = ("source", "target")


def test_both_forms_say_the_same(workplace: Path) -> None:
    pairs = [("one", "eins"), ("two, three", 'zwei "drei"'), ("eins", "one"), ("naïve", "☃")]
    tabs = "\ufeff" + "\r\n\n".join("\t".join(pair) for pair in [*pairs, pairs[0]])
    Path("pairs.tsv").write_text(tabs, newline="")
    Path("pairs.txt.gz").write_bytes(gzip.compress(tabs.encode()))
    lines = [json.dumps(dict(zip(NAMES, pair, strict=True)), ensure_ascii=i % 2 == 0) for i, pair in enumerate(pairs)]
    Path("pairs.jsonl").write_text("\n\n".join([*lines, lines[0]]))
    for name in ("pairs.tsv", "pairs.txt.gz", "pairs.jsonl"):
        rows, repeated = columns.read(name, NAMES, given=0)
        assert ([row[:2] for row in rows], repeated) == (pairs, 1), name
    assert columns.read("pairs.tsv", NAMES, given=0)[0][1].place == "corpus pairs.tsv, line 3"


def test_what_a_network_reads_has_one_answer(workplace: Path) -> None:
    """Lines are divided among splits: the other answer could be held out, and the text be trained on."""
    Path("pairs.tsv").write_text("a\tx\n\nb\tx\na\tx\na\ty\n")
    with pytest.raises(UserError, match="pairs.tsv, line 5: its source has another target in line 1: keep one"):
        columns.read("pairs.tsv", NAMES, given=0)
    with pytest.raises(UserError, match="pairs.tsv, line 3: its target has another source in line 1: keep one"):
        columns.read("pairs.tsv", NAMES, given=1)


BAD = {
    "x.tsv": {
        "a": "x.tsv, line 1: it has 0 tabs: expected source, a tab, target",
        "a\tb\n\nc\td\te": "x.tsv, line 3: it has 2 tabs",
        "a\t": "x.tsv, line 1: its target is empty",
        "\tb": "x.tsv, line 1: its source is empty",
        "": "x.tsv: it has no lines: a line is source, a tab, target",
        "a\tb\n\udcff\tc": "x.tsv, line 2: it is no UTF-8",
        '{"source": "a", "target": "b"}': "x.tsv, line 1: it has 0 tabs",
    },
    "x.jsonl": {
        "a\tb": "x.jsonl, line 1: it is no JSON: expected an object",
        '{"source": "a"}': "x.jsonl, line 1: it has no target: expected a text",
        '{"source": "a", "target": ""}': "x.jsonl, line 1: its target is empty",
        '{"source": "a", "target": 3}': "x.jsonl, line 1: its target is a number",
        '{"source": "a", "target": "b"}\n["a", "b"]': "x.jsonl, line 2: it is a list: expected an object",
    },
}


@pytest.mark.parametrize(("name", "text", "message"), [(n, t, m) for n, texts in BAD.items() for t, m in texts.items()])
def test_bad_lines(workplace: Path, name: str, text: str, message: str) -> None:
    Path(name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        columns.read(name, NAMES, given=0)
    assert message in str(error.value)


def test_what_is_no_file(workplace: Path) -> None:
    Path("folder").mkdir()
    for name, message in {"folder": "it is a folder: name a file", "none.tsv": "no such file"}.items():
        with pytest.raises(UserError, match=message):
            columns.read(name, NAMES, given=0)
