"""YAML as lm reads it: no key twice, no endless aliases, holders of anchors, sections with nothing in them."""

import re
from pathlib import Path

import pytest
import yaml

from lm.cli import help, yaml_files
from tests.conftest import RECIPE

TWICE = "trainer:\n  max_steps: 3\n  devices: 1\n  max_steps: 4\n"
BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{after}: &{after} [{', '.join([f'*{name}'] * 9)}]" for name, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TWICE, "bad.yaml: key max_steps is there twice, in lines 2 and 4"),
        ("trainer: {}\nseed_everything: 1\ntrainer: {}\n", "bad.yaml: key trainer is there twice, in lines 1 and 3"),
        ("data: {init_args: {corpus: a, corpus: b}}", "bad.yaml: key corpus is there twice, in lines 1 and 1"),
        (BILLION, "bad.yaml: line .*: its aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "bad.yaml: line 1 has an alias of what it is part of"),
        *(
            (f"{section}: {value}", f"bad.yaml: {section}: found .*, expected a YAML mapping")
            for section, value in zip(
                help.SECTIONS, ("[]", "3", "5.5", f"1{'0' * 30}", "[a]", "true", "-1"), strict=True
            )
        ),
        *((f"config: {value}", "bad.yaml: config: a file names no others") for value in ("-1", "[a.yaml]", "{a: 1}")),
        *(
            (f"source: {value}", "bad.yaml: source: found .*, expected a list")
            for value in ("-1", "text.txt", "{a: 1}")
        ),
        (
            "trainer.max_steps: 3\ntrainer: {max_steps: 4}",
            r"bad.yaml: key trainer is there twice, .* 1 \(.* and 2",
        ),
        ("trainer.max_steps: 3\ntrainer: {devices: 4}", r"bad.yaml: key trainer is there twice, .* 1 \(.* and 2"),
        (
            "trainer: {max_steps: 4}\ntrainer.max_steps: 3",
            "bad.yaml: key trainer.max_steps is there twice, .* 1 and 2",
        ),
        ("data:\n  init_args.a.b: 3\n  init_args: {a: {b: 4}}", r"bad.yaml: key init_args is there twice, in lines 2 "),
        (
            "data: {init_args: {a: 1}}\ndata.init_args: {b: 2}",
            "bad.yaml: key data.init_args is there twice, .* 1 and 2",
        ),
        *(
            (f"{key}: 1", f"bad.yaml: line 1: key {key or 'null'} is no name")
            for key in ("null", "~", "1", "0.5", "yes")
        ),
        *((f"? {key}\n: 1", "bad.yaml: line 1: key a list or a mapping is no name") for key in ("[a]", "{a: 1}")),
        ("trainer: {1: 2}", "bad.yaml: line 1: key 1 is no name"),
        ("\na: !!python/object:os.system {}", "bad.yaml: line 2: the tag !!python/object:os.system is not read here"),
        ("name: !foo x", "bad.yaml: line 1: the tag !foo is not read here"),
        ("name: =", "bad.yaml: line 1: the tag !!value is not read here"),
        ("name: !!set {a}", "bad.yaml: line 1: the tag !!set is not read here"),
        ("trainer:\n  <<: 5", "--config bad.yaml, line 2: expected a mapping or list of mappings for merging"),
        ("name: !!map [a]", "--config bad.yaml, line 1: expected a mapping node"),
        ('name: "\\ud800"', "--config bad.yaml, line 1: .* invalid Unicode character escape code"),
        (f"seed_everything: {'1' * 5000}", "bad.yaml: line 1: a number of 5,000 digits: none is that large"),
        ("trainer:\n  max_steps: 010", "bad.yaml: line 2: 010 is 8 in YAML: write 8, or '010' for a text"),
        ("trainer: {max_steps: -1:30}", "bad.yaml: line 1: -1:30 is -90 in YAML: write -90, or"),
        ("trainer: {gradient_clip_val: 1:30.5}", "bad.yaml: line 1: 1:30.5 is 90.5 in YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "bad.yaml: nested too deeply"),
    ],
)
def test_what_is_refused(lm, workplace: Path, text: str, expected: str) -> None:
    (workplace / "bad.yaml").write_text(text)
    for words in (("fit", "--config", "bad.yaml"), ("prepare", "--config=bad.yaml")):
        code, _, err = lm(*words)
        assert (code, err.count("\n")) == (2, 1), err
        assert re.match(f"error: {expected}", err), err


def test_names_with_dots_and_quoted_numbers_are_read() -> None:
    assert yaml_files.parse("{wiki.txt: 1, wiki: 2}") == {"wiki.txt": 1, "wiki": 2}  # a corpus of two files
    assert yaml_files.parse("a: {b: 1}\na.c: 2\n'1': '010'") == {"a": {"b": 1}, "a.c": 2, "1": "010"}


@pytest.mark.parametrize(
    ("command", "option"),
    [("fit", "--trainer.max_steps"), ("sample", "--seed"), ("plan", "--data.batch_size")],
)
def test_a_number_to_base_60_in_an_option(lm, command: str, option: str) -> None:
    for words in ((option, "1:30"), (f"{option}=1:30",)):
        code, _, err = lm(command, *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith(f"error: {option}: found '1:30', expected a number"), err


def test_a_key_twice_in_an_option(lm) -> None:
    code, _, err = lm("fit", "--config", "tiny.yaml", "--data.init_args", "{block_size: 8, block_size: 9}")
    assert (code, err.count("\n")) == (2, 1), err
    assert "block_size: 8, block_size: 9" in err


def test_holders_anchors_and_merges(lm, workplace: Path) -> None:
    recipe = yaml.safe_dump(RECIPE)
    text = f"x-sizes: &sizes {{n_layer: 1, n_head: 2}}\n.wide: &wide\n  <<: *sizes\n  n_embd: 16\n{recipe}"
    text = re.sub(r"n_embd: 16\n +n_head: 2\n +n_layer: 1", "<<: *wide", text)
    assert "<<: *wide" in text
    assert yaml_files.parse(text) == RECIPE
    (workplace / "held.yaml").write_text(text)
    code, _, err = lm("fit", "--config", "held.yaml", "--trainer.max_steps", 1)
    assert code == 0, err


def test_holders_are_for_files_alone() -> None:
    assert yaml_files.parse("{.txt: 1, x-b.txt: 2}") == {".txt": 1, "x-b.txt": 2}
    assert yaml_files.parse("Q:") == "Q:"


@pytest.mark.parametrize("section", help.SECTIONS)
def test_a_section_with_nothing_in_it_is_as_if_left_out(section: str) -> None:
    recipe = {key: value for key, value in RECIPE.items() if key != section}
    assert yaml_files.parse(f"{section}:\n" + yaml.safe_dump(recipe)) == recipe


def test_fit_with_empty_sections(lm, workplace: Path) -> None:
    recipe = {key: value for key, value in RECIPE.items() if key in ("model", "data")}
    (workplace / "empty.yaml").write_text("trainer:\nsamples:\nwatch:\n" + yaml.safe_dump(recipe))
    code, _, err = lm("fit", "--config", "empty.yaml", "--trainer.max_steps", 1, "--trainer.accelerator", "cpu")
    assert code == 0, err
    (workplace / "empty.yaml").write_text("trainer:\n")
    code, _, err = lm("fit", "--config", "empty.yaml")
    assert (code, err.count("\n")) == (2, 1), err


def test_a_section_alone_and_init_args_alone() -> None:
    assert yaml_files.parse("trainer:\n") == {}
    assert yaml_files.parse("data:\n  class_path: a.B\n  init_args:\n") == {"data": {"class_path": "a.B"}}
    assert yaml_files.parse("checkpoint:\n  keep_last:\n") == {"checkpoint": {"keep_last": None}}


def test_brackets_without_end_are_one_line(lm, workplace: Path) -> None:
    Path("more.yaml").write_text("trainer.barebones: " + "[" * 900 + "\n")
    code, _, err = lm("fit", "--config", "tiny.yaml", "--config", "more.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "more.yaml: nested too deeply" in err
