import math
from pathlib import Path

import pytest
import torch

from lm.errors import UserError
from lm.generation.sampling import Sampler, TextStream, choose, generate, start_tokens
from lm.models import GPT, Bigram
from lm.tokenizers import BytePairTokenizer, CharTokenizer
from tests.support.samples import BYTES

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]], dtype=torch.float64)
NONE_SEEN = torch.zeros(1, 0, dtype=torch.int64)


def probabilities(seen: torch.Tensor = NONE_SEEN, **settings: float) -> list[float]:
    found = Sampler(**settings).probabilities(LOGITS, seen)  # type: ignore[arg-type]
    assert float(found.sum()) == pytest.approx(1, rel=1e-12)
    return found[0].tolist()


def softmax(*logits: float) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


def test_temperature() -> None:
    assert probabilities() == pytest.approx(softmax(2, 1, 0, -1, 3))
    assert probabilities(temperature=0.5) == pytest.approx(softmax(4, 2, 0, -2, 6))
    assert probabilities(temperature=0) == [0, 0, 0, 0, 1]


def test_a_token_is_chosen_by_its_part_of_the_whole() -> None:
    parts = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    below = 1 - 2**-53  # the largest number that is drawn
    draws = torch.tensor([[0.0], [0.2499], [0.25], [0.7499], [0.75], [below]], dtype=torch.float64)
    assert choose(parts.expand(6, -1), draws).squeeze(1).tolist() == [1, 1, 3, 3, 4, 4]
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(200, 50257, generator=generator)
    edge = torch.full((200, 1), below, dtype=torch.float64)
    assert choose(rows, edge).unique().tolist() == [50256]


def test_top_k_keeps_the_k_likeliest() -> None:
    a, b = softmax(2, 3)
    assert probabilities(top_k=2) == pytest.approx([a, 0, 0, 0, b])
    assert probabilities(top_k=99) == pytest.approx(softmax(2, 1, 0, -1, 3))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # likeliest first: 0.636, 0.234, 0.086, 0.032, 0.012
    assert probabilities(top_p=0.6) == [0, 0, 0, 0, 1]
    a, b = softmax(2, 3)
    assert probabilities(top_p=0.7) == pytest.approx([a, 0, 0, 0, b])
    assert probabilities(top_p=1.0) == pytest.approx(softmax(2, 1, 0, -1, 3))


def test_min_p_is_relative_to_the_likeliest() -> None:
    a, b, c = softmax(2, 1, 3)
    assert probabilities(min_p=math.exp(-2.5)) == pytest.approx([a, b, 0, 0, c])


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    seen = torch.tensor([[0, 3, 0]])
    assert probabilities(seen, repetition_penalty=2.0) == pytest.approx(softmax(1, 1, 0, -2, 3))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}],
)
def test_values_out_of_range_are_refused(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"^{name} is .*: it must be"):
        Sampler(**settings)


@pytest.mark.parametrize("logits", [LOGITS, -LOGITS, torch.zeros(1, 5)])
@pytest.mark.parametrize(
    "settings",
    [
        *({name: 1e-320} for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        *({name: 1.0} for name in ("top_p", "min_p")),
        *({name: 1e308} for name in ("temperature", "repetition_penalty")),
        *({"top_k": k} for k in (1, 2**63 - 1)),
        {"temperature": 1e-37, "top_k": 1, "top_p": 1e-320, "min_p": 1.0, "repetition_penalty": 1e308},
    ],
)
def test_at_the_bounds_the_likeliest_stays(settings: dict, logits: torch.Tensor) -> None:
    found = Sampler(**settings).probabilities(logits.float(), torch.tensor([[0, 3, 0]]))
    assert float(found.sum()) == pytest.approx(1) and found.isfinite().all(), found
    if "repetition_penalty" not in settings:
        assert (found[logits == logits.max()] > 0).any()


def take(net: torch.nn.Module, prompt: list[list[int]], count: int, seed: int = 1) -> torch.Tensor:
    stream = generate(net, torch.tensor(prompt), sampler=Sampler(), generator=torch.Generator().manual_seed(seed))
    return torch.stack([next(stream) for _ in range(count)], dim=1)  # (B, count)


def test_samples_follow_the_networks_probabilities() -> None:
    net = Bigram(5, 4)
    net.table.weight.data[2] = LOGITS[0].float()
    counts = take(net, [[2]] * 20_000, 1).flatten().bincount(minlength=5) / 20_000
    torch.testing.assert_close(counts, LOGITS[0].softmax(0).float(), atol=0.015, rtol=0)


def test_a_seed_repeats_the_text_and_leaves_the_global_numbers_alone() -> None:
    net = GPT(9, 6, n_layer=1, n_head=1, n_embd=8).eval()
    before = torch.get_rng_state()
    first = take(net, [[1], [1]], 20)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(take(net, [[1], [1]], 20), first)
    assert not torch.equal(take(net, [[1], [1]], 20, seed=2), first)
    assert not torch.equal(first[0], first[1])


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    net = GPT(9, 6, n_layer=1, n_head=1, n_embd=8).eval()
    assert torch.equal(take(net, [[5] * 30 + [1, 2, 3, 4, 5, 6]], 12), take(net, [[1, 2, 3, 4, 5, 6]], 12))


def stream(tokenizer: BytePairTokenizer | CharTokenizer, text: str, stops: list[str]) -> tuple[str, list[str]]:
    out = TextStream(tokenizer, stops)
    pieces = []
    for token in tokenizer.encode(text).tolist():
        if not out.done:
            pieces.append(out.add(token))
    pieces.append(out.finish())
    assert "".join(pieces) == out.text
    return out.text, pieces


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("aaabc", ["aab"], "a"),  # it starts again inside a match that failed
        ("abcabd", ["abd"], "abc"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("xyz", ["zz"], "xyz"),  # held back, then let go
        ("abc", ["c", "bc"], "a"),
        ("stop", ["stop"], ""),
        ("ababab", ["abb", "abac"], "ababab"),
        ("日本語", ["語"], "日本"),
    ],
)
def test_stop_strings(text: str, stops: list[str], expected: str) -> None:
    assert stream(BytePairTokenizer(BYTES), text, stops)[0] == expected
    assert stream(CharTokenizer(text), text, stops)[0] == expected


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    text, pieces = stream(BytePairTokenizer(BYTES), "a日é", [])
    assert text == "a日é"
    assert pieces == ["a", "", "", "日", "", "é", ""]


def test_text_that_ends_inside_a_character_says_so() -> None:
    tokenizer = BytePairTokenizer(BYTES)
    out = TextStream(tokenizer, [])
    shown = "".join(out.add(token) for token in tokenizer.encode("日").tolist()[:2]) + out.finish()
    assert shown == "\ufffd"


def test_the_end_of_text_token_ends_it() -> None:
    tokenizer = BytePairTokenizer(BYTES)
    out = TextStream(tokenizer, ["bc"])
    assert [out.add(97), out.add(98), out.add(tokenizer.eot), out.done] == ["a", "", "b", True]


def test_an_empty_prompt_starts_after_an_end(tmp_path: Path) -> None:
    assert start_tokens(BytePairTokenizer(BYTES), "") == [256]
    assert start_tokens(CharTokenizer("ab\n"), "") == [0]
    assert start_tokens(CharTokenizer("zab"), "") == [0]
    assert start_tokens(CharTokenizer("zab"), "ab") == [0, 1]


def test_a_prompt_follows_the_mark_that_every_text_was_trained_after() -> None:
    marked, plain = CharTokenizer("ab", end="."), CharTokenizer("ab")
    assert start_tokens(marked, "ab") == [0, 1, 2]
    assert start_tokens(marked, "") == [0]
    assert start_tokens(plain, "ab") == [0, 1]
    stream = TextStream(marked, [])
    assert stream.add(1) + stream.add(0) == "a" and stream.done
