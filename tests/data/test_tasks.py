import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lm.checkpoints.restore import load_network
from lm.data import ArithmeticData, ReverseData
from lm.data.module import IGNORED
from lm.errors import UserError
from lm.generation.sampling import Sampler, generate


def made(kind=ArithmeticData, **settings):
    data = kind(**settings)
    data.setup("fit")
    return data


def written(data, row: int, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[str, str]:
    chosen = targets[row][targets[row] != IGNORED]
    return data.text_tokenizer.decode(tokens[row].tolist()), data.text_tokenizer.decode(chosen.tolist())


@pytest.mark.parametrize(
    ("operators", "reverse", "index", "expected"),
    [
        ("+", True, 123_456, ("123+456=", "975")),
        ("+", True, 999_999, ("999+999=", "8991")),
        ("+", False, 999_999, ("999+999=", "1998")),
        ("-", True, 5_123, ("5-123=", "-811")),
        ("*", False, 12_012, ("12*12=", "144")),
        ("/", False, 17 * 999 + 4, ("17/5=", "3r2")),
        ("/", False, 17 * 999, ("17/1=", "17r0")),
        ("/", False, 1000 * 999 - 1, ("999/999=", "1r0")),
        ("/+", False, 17_005, ("17+5=", "22")),
        ("/+", False, 1000**2 + 17 * 999 + 4, ("17/5=", "3r2")),
        ("+-", False, 2 * 7_003 + 1, ("7-3=", "4")),
    ],
)
def test_examples(operators: str, reverse: bool, index: int, expected: tuple[str, str]) -> None:
    data = ArithmeticData(operators=operators, reverse=reverse)
    assert data.example(index) == expected


def test_padded_operands() -> None:
    assert ArithmeticData(pad=True).example(7_003) == ("007+003=", "01")


def test_only_the_answer_and_its_mark_are_targets() -> None:
    data = made(block_size=16)
    tokens, targets = data.batch(np.array([123_456, 1_002]))
    assert written(data, 0, tokens, targets) == (".123+456=975....", "975.")
    assert written(data, 1, tokens, targets) == (".1+2=3..........", "3.")
    place = (targets[0] != IGNORED).nonzero().flatten()
    assert place.tolist() == [8, 9, 10, 11]  # each predicts the token after it
    assert targets[0, 8] == tokens[0, 9]


def test_training_never_draws_what_is_held_out() -> None:
    data = made(digits=1, held_out=20)
    drawn = set(data.problems(0, 5000).tolist())
    held = set(data._held.tolist())
    assert len(held) == 40 and not drawn & held
    assert drawn | held == set(range(100))


@pytest.mark.parametrize("seed", [1, 2])
def test_training_draws_from_so_many(seed: int) -> None:
    """Of each seed the same ones, spread over all, and never one that is held out."""
    data = made(held_out=1000, train_problems=300, seed=seed)
    drawn = set(data.problems(0, 5000).tolist())
    assert len(drawn) == 300 and not drawn & set(data._held.tolist())
    assert drawn == set(made(held_out=1000, train_problems=300, seed=3).problems(7, 5000).tolist())
    assert len({number // 10_000 for number in drawn}) > 80  # of a hundred


SETTINGS = [
    (digits, operators, reverse, pad)
    for digits in (1, 2)
    for operators in ("+", "-", "*", "/", "+/", "/-", "+-*/")
    for reverse in (False, True)
    for pad in (False, True)
]


@pytest.mark.parametrize(("digits", "operators", "reverse", "pad"), SETTINGS)
def test_no_text_is_in_two_splits(digits: int, operators: str, reverse: bool, pad: bool) -> None:
    """Each problem is one text and one number, and no quotient by zero is among them."""
    settings = {"digits": digits, "operators": operators, "reverse": reverse, "pad": pad}
    data = made(**settings, held_out=40 if digits == 1 else 1000)
    texts = ["".join(data.example(i)) for i in range(data.size)]
    assert len(set(texts)) == len(texts) == data.size
    assert not [text for text in texts if re.search("/0+=", text)]
    assert len([text for text in texts if "/" in text]) == ("/" in operators) * 10**digits * (10**digits - 1)
    held = [texts[i] for i in data._held]
    train = {texts[i] for i in data.problems(0, 20_000)}
    assert len(set(held)) == 2 * data.held_out and not train & set(held)
    if digits == 1:
        assert train | set(held) == set(texts)


@pytest.mark.parametrize("digits", [3, 9])
def test_of_more_digits_neither(digits: int) -> None:
    data = made(digits=digits, operators="/", block_size=40, held_out=500)
    texts = [{data.example(int(i))[0] for i in some} for some in (data._held, data.problems(0, 10_000))]
    assert len(texts[0]) == 1000 and not texts[0] & texts[1] and not [t for t in set.union(*texts) if "/0=" in t]


def test_a_stack_of_steps_is_the_steps_and_seeds_differ() -> None:
    data = made(batch_size=4)
    tokens, targets = data.train_dataset(3)[1]
    for i in range(3):
        assert torch.equal(tokens[i], data.train_dataset(1)[3 + i][0])
        assert torch.equal(targets[i], data.train_dataset(1)[3 + i][1])
    assert not np.array_equal(data.problems(0, 9), made(seed=1).problems(0, 9))


def test_strings_are_reversed_and_all_of_them_are_there() -> None:
    data = made(ReverseData, alphabet="abc", shortest_length=1, longest_length=3, held_out=5)
    examples = [data.example(i) for i in range(data.size)]
    assert data.size == 3 + 9 + 27 == len(set(examples))
    assert all(problem == answer[::-1] + ">" for problem, answer in examples)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ArithmeticData, {"operators": "%"}, "unknown operator '%'"),
        (ArithmeticData, {"operators": ""}, "is empty"),
        (ArithmeticData, {"digits": 0}, "data.digits is 0"),
        (
            ArithmeticData,
            {"digits": 5},
            r"data.block_size 16 does not hold 99999\+99999=899991 and a mark: it needs 19",
        ),
        (ArithmeticData, {"held_out": 500_000}, "leave none to train on: there are 1,000,000 problems"),
        (ArithmeticData, {"digits": 1, "held_out": 20, "train_problems": 61}, "data.train_problems 61 is more"),
        (ReverseData, {"held_out": 5, "train_problems": 0}, "data.train_problems is 0"),
        (ReverseData, {"alphabet": "aa"}, "data.alphabet is 'aa'"),
        (ReverseData, {"shortest_length": 7}, "data.shortest_length 7 is above"),
        (ReverseData, {"longest_length": 9}, "data.block_size 16 does not hold"),
    ],
)
def test_bad_settings(kind, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(kind, **settings)


@pytest.mark.parametrize(
    ("settings", "prompt", "question"),
    [
        ({"pad": True}, "12+34=", ("12+34=", "012+034=")),
        ({"pad": True}, " 012 + 034 ", ("12+34=", "012+034=")),
        ({"pad": False}, "0012+34", ("12+34=", "12+34=")),
        ({"operators": "/*-+"}, "7-0=", ("7-0=", "7-0=")),
    ],
)
def test_a_prompt_takes_the_form_of_the_problems(settings: dict, prompt: str, question: tuple[str, str]) -> None:
    assert ArithmeticData(**settings).question(prompt) == question


@pytest.mark.parametrize("operators", ["+-*/", "-"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_problem_is_a_question_and_every_answer_readable(operators: str, pad: bool, reverse: bool) -> None:
    data = ArithmeticData(digits=2, operators=operators, pad=pad, reverse=reverse)
    for problem, answer in map(data.example, range(0, data.size, 37)):
        shown, asked = data.question(problem)
        assert asked == problem
        a, operator, b = re.fullmatch(r"(\d+)(.)(\d+)=", shown).groups()
        a, b = int(a), int(b)
        expected = f"{a // b}r{a % b}" if operator == "/" else str({"+": a + b, "-": a - b, "*": a * b}[operator])
        assert data.readable(answer) == expected.removesuffix("r0").replace("r", " remainder ")


@pytest.mark.parametrize("prompt", ["12", "12+", "1234+1=", "12*3=", "12+34=4", "hello", "5/0=", "²+1="])
def test_what_is_no_problem_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match=r"is no problem of this network: it takes .* say|divided by zero"):
        ArithmeticData(operators="+/").question(prompt)
    with pytest.raises(UserError, match=r"it takes 3 to 6 letters of abcdefgh, aaa> say"):
        ReverseData().question(prompt)


def test_sample_writes_and_reads_the_form_of_the_problems(lm, workplace: Path) -> None:
    """What the network is shown and writes is the task's form; what people see is not."""
    net = {"class_path": "lm.models.GPT", "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16}}
    settings = {"digits": 3, "pad": True, "held_out": 5, "batch_size": 64}
    recipe = {
        "trainer": {"max_steps": 40, "val_check_interval": 40, "accelerator": "cpu", "devices": 1},
        "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": net}},
        "data": {"class_path": "lm.data.ArithmeticData", "init_args": settings},
    }
    Path("sums.yaml").write_text(yaml.safe_dump(recipe))
    assert lm("fit", "--config", "sums.yaml")[0] == 0
    fitted = load_network(Path("checkpoints/sums/last.ckpt"))
    data, answers = made(**settings), set()
    for prompt, shown, asked in (("12+34=", "12+34=", ".012+034="), ("999+ 007", "999+7=", ".999+007=")):
        tokens = torch.tensor([data.text_tokenizer.encode(asked).tolist()])
        logits = generate(fitted.net, tokens, sampler=Sampler(temperature=0), generator=torch.Generator())
        written = data.text_tokenizer.decode([int(next(logits)) for _ in range(6)]).partition(".")[0]
        words = ("--prompt", prompt, "--temperature", 0, "--max_new_tokens", 6, "--json")
        code, out, _ = lm("sample", "--ckpt_path", "checkpoints/sums/last.ckpt", *words)
        assert code == 0 and json.loads(out.splitlines()[-1])["text"] == [shown + written[::-1]]
        answers.add(written)
    assert any(written != written[::-1] for written in answers)  # that they are turned round shows
    code, _, error = lm("sample", "--ckpt_path", "checkpoints/sums/last.ckpt", "--prompt", "1234+5=")
    assert code == 2 and "--prompt: '1234+5=' is no problem of this network" in error
    Path("prompt.txt").write_text("1234+5=")
    code, _, error = lm("sample", "--ckpt_path", "checkpoints/sums/last.ckpt", "--prompt_file", "prompt.txt")
    assert code == 2 and "--prompt_file: '1234+5=' is no problem of this network" in error


@pytest.mark.parametrize("data", ["TextData", "LinesData", "ArithmeticData"])
def test_seq2seq_on_data_without_a_source_is_refused(lm, workplace: Path, data: str) -> None:
    more = {"TextData": {"corpus": "text.txt"}, "LinesData": {"corpus": "text.txt", "targets": "all", "end": "|",
            "block_size": 64}, "ArithmeticData": {"held_out": 5, "digits": 1}}[data]  # fmt: skip
    net = {"class_path": "lm.models.Seq2Seq", "init_args": {"n_layer": 1, "n_head": 2, "n_embd": 16, "start_token": 3}}
    recipe = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1},
        "model": {"class_path": "lm.training.LanguageModel", "init_args": {"net": net}},
        "data": {"class_path": f"lm.data.{data}", "init_args": more},
    }
    Path("wrong.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = lm("fit", "--config", "wrong.yaml")
    assert code == 2 and "model.net Seq2Seq writes what follows token 3, " in error.splitlines()[-1], error
    assert f"but {data} has targets before it" in error.splitlines()[-1]


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("operators", ["+", "-", "*", "/", "/+"])
@pytest.mark.parametrize("pad", [False, True])
def test_the_longest_problem_is_as_long_as_any(digits: int, operators: str, pad: bool) -> None:
    data = ArithmeticData(digits=digits, operators=operators, pad=pad, held_out=5)
    assert len("".join(data.longest())) == max(len("".join(data.example(i))) for i in range(data.size))
