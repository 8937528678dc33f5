"""The engine: a request gets the same tokens whatever else is in work, and whenever it arrives."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from lm.errors import CheckError, UserError
from lm.generation import Sampler, generate
from lm.generation.engine import Engine, Request, Text, steady_rows
from lm.generation.packed import packed
from lm.models import GPT, LSTM, MLP, Bigram, GatedWaveNet, Seq2Seq, WaveNet
from lm.tokenizers import CharTokenizer
from tests.support.cases import often

LETTERS = "abcdefghijklmnopqrstuvwxyz .,;:'\n"
TOKENIZER = CharTokenizer(LETTERS)
V, BLOCK = len(LETTERS), 96
KINDS: dict[str, Any] = {
    "learned": {},
    "rotary": {"positions": "rotary", "n_kv_head": 2, "norm": "rms", "feed_forward": "swiglu", "bias": False},
    "documents": {"document_end": 3, "qk_norm": True, "logit_soft_cap": 20.0},
    "separate": {"attention": "separate"},
    "shift": {"token_shift": True, "positions": "rotary"},
    "shift, documents": {"token_shift": True, "document_end": 3},
}


def made(kind: str = "learned", dtype: torch.dtype = torch.float32, **sizes: int) -> GPT:
    torch.manual_seed(1)
    net = GPT(V, BLOCK, **{"n_layer": 2, "n_head": 4, "n_embd": 48} | sizes | KINDS[kind], init_std=0.3)
    return net.to(dtype).eval()


def drawn(draw: random.Random, *, longest: int = 40) -> Request:
    sampler = Sampler(
        temperature=draw.choice([0.0, 0.7, 1.0, 1.5]), top_k=draw.choice([None, 3, 10]),
        top_p=draw.choice([None, 0.9]), repetition_penalty=draw.choice([1.0, 1.3]),
    )  # fmt: skip
    prompt = [draw.randrange(V) for _ in range(draw.randint(1, 60))]
    return Request(
        prompt=prompt, sampler=sampler, seed=draw.randrange(10**6), max_new_tokens=draw.randint(1, longest),
        stop=draw.choice([(), ("ab",), (".", "qz")]), logprobs=draw.choice([0, 3]),
        logit_bias=draw.choice([(), ((5, 2.0),)]), presence_penalty=draw.choice([0.0, 0.0, 0.7]),
    )  # fmt: skip


def mixed(engine: Engine, requests: list[Request], draw: random.Random) -> list[Text]:
    """Continue requests that arrive between steps, in any order; some others are cancelled."""
    left = list(enumerate(requests))
    draw.shuffle(left)
    texts: dict[int, Text] = {}
    disturbing: list[Text] = []
    while left or engine.busy:
        for _ in range(draw.randint(0, 3)):
            if left:
                number, request = left.pop()
                texts[number] = engine.submit(request)
        if draw.random() < 0.2 and len(disturbing) < 8:
            disturbing.append(engine.submit(drawn(draw)))
        if draw.random() < 0.1 and disturbing:
            engine.cancel(draw.choice(disturbing))
        engine.step()
    return [texts[number] for number in range(len(requests))]


@pytest.mark.parametrize("mixes", [3, pytest.param(125, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_as_if_alone(kind: str, mixes: int) -> None:
    """Whatever else is there, to the last bit of its log-probabilities: 500 mixes of the four kinds."""
    draw = random.Random(2)
    net = made(kind)
    for mix in range(mixes):
        requests = [drawn(draw) for _ in range(draw.randint(2, 10))]
        alone = [Engine(net, TOKENIZER, slots=16).run([request])[0] for request in requests]
        together = mixed(Engine(net, TOKENIZER, slots=16), requests, draw)
        assert [text.tokens for text in together] == [text.tokens for text in alone], mix
        assert [text.logprobs for text in together] == [text.logprobs for text in alone], mix  # to the last bit
        assert [text.text for text in together] == [text.text for text in alone]
        assert [text.finished for text in together] == [text.finished for text in alone]


@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_widths_that_fill_no_vectors(feed_forward: Any) -> None:
    """torch rounds an activation's last elements otherwise, which must not be those of a row."""
    torch.manual_seed(1)
    net = packed(GPT(V, 32, n_layer=2, n_head=1, n_embd=32, hidden_size=101, feed_forward=feed_forward, init_std=0.3))
    requests = [Request(prompt=[i], seed=i, max_new_tokens=20, logprobs=0) for i in range(7)]
    together = Engine(net.eval(), TOKENIZER, slots=7).run(requests)
    alone = [Engine(net, TOKENIZER, slots=7).run([request])[0] for request in requests]
    assert [text.logprobs for text in together] == [text.logprobs for text in alone]


def test_two_threads() -> None:
    """The thread that computes a text changes no bit."""
    threads, net = torch.get_num_threads(), packed(made())
    torch.set_num_threads(2)
    try:
        requests = [Request(prompt=[i] * 60, seed=i, max_new_tokens=12, logprobs=0) for i in range(6)]
        together = Engine(net, TOKENIZER, slots=8).run(requests)
        alone = [Engine(net, TOKENIZER, slots=8).run([request])[0] for request in requests]
    finally:
        torch.set_num_threads(threads)
    assert [text.logprobs for text in together] == [text.logprobs for text in alone]


NETS: dict[str, Any] = {
    **{kind: lambda kind=kind: made(kind, torch.float64) for kind in KINDS},
    "bigram": lambda: Bigram(V, BLOCK),
    "mlp": lambda: MLP(V, 8),
    "wavenet": lambda: WaveNet(V, 8),
    "dense": lambda: WaveNet(V, BLOCK, depth=3, dense=True),
    "gated": lambda: GatedWaveNet(V, BLOCK),
    "lstm": lambda: LSTM(V, BLOCK),
    "source and target": lambda: Seq2Seq(V, BLOCK, start_token=1),
}


@pytest.mark.parametrize("name", often(NETS, [*NETS][::2].__contains__))
def test_its_tokens_are_those_of_generate(name: str) -> None:
    """In float64: also beyond the context, and for a batch of unequal prompts."""
    torch.manual_seed(3)
    net: nn.Module = NETS[name]().double().eval()
    draw = random.Random(4)
    requests = [
        Request(prompt=[draw.randrange(V) for _ in range(length)], seed=length, max_new_tokens=32)
        for length in (1, 5, 70, 96, 97, 130)
    ]
    texts = Engine(net, TOKENIZER, slots=3).run(requests)
    for request, text in zip(requests, texts, strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        tokens = generate(net, torch.tensor([request.prompt]), sampler=request.sampler, generator=generator)
        assert text.tokens == [int(next(tokens)) for _ in range(32)], request.prompt
        assert text.finished == "length" and text.text == TOKENIZER.decode(text.tokens)


def test_a_prompt_that_another_has_read_is_copied() -> None:
    net = made("rotary")
    prompt = [i % V for i in range(70)]
    engine = Engine(net, TOKENIZER, slots=4, piece=16)
    reads: list[int] = []
    net.register_forward_hook(lambda net, inputs, out: reads.append(inputs[0].shape[1]))
    texts = engine.run([Request(prompt=prompt, seed=seed, max_new_tokens=8) for seed in range(4)])
    assert sum(size > 1 for size in reads) == 5
    engine.run([Request(prompt=[*prompt[:68], 1, 2], max_new_tokens=8)])
    assert sum(size > 1 for size in reads) == 5 + 1  # of a longer one, the last piece alone
    alone = [
        Engine(net, TOKENIZER, piece=16).run([Request(prompt=prompt, seed=i, max_new_tokens=8)])[0] for i in range(4)
    ]
    assert [text.tokens for text in texts] == [text.tokens for text in alone]
    assert len({tuple(text.tokens) for text in texts}) == 4


def test_a_long_prompt_does_not_keep_others_waiting() -> None:
    engine = Engine(made(), TOKENIZER, slots=2, piece=8)
    short = engine.submit(Request(prompt=[1], max_new_tokens=20))
    engine.step()
    long = engine.submit(Request(prompt=[2] * 80, max_new_tokens=1))
    made_meanwhile = len(short.tokens)
    while not long.tokens:
        engine.step()
    assert len(short.tokens) >= made_meanwhile + 9  # ten pieces, and a token of the other's with each


def test_order_is_that_of_arrival_and_cancelling_frees_at_once() -> None:
    engine = Engine(made(), TOKENIZER, slots=1)
    texts = [engine.submit(Request(prompt=[i], max_new_tokens=5)) for i in range(3)]
    engine.step()
    assert [len(text.tokens) for text in texts] == [1, 0, 0]
    engine.cancel(texts[0])
    engine.cancel(texts[2])
    assert texts[0].finished == texts[2].finished == "cancelled" and not engine.running
    engine.step()
    assert [len(text.tokens) for text in texts] == [1, 1, 0]
    while engine.busy:
        engine.step()
    assert texts[1].finished == "length"


def test_no_row_is_read_in_vain() -> None:
    """A prompt of one token is read with the others' tokens, and texts move to the first slots when others end."""
    net = made(dtype=torch.float64)
    engine = Engine(net, TOKENIZER, slots=8)
    reads: list[tuple[int, ...]] = []
    net.register_forward_pre_hook(lambda net, inputs: reads.append(tuple(inputs[0].shape)))
    requests = [Request(prompt=[i], seed=i, max_new_tokens=30 if i == 7 else 5) for i in range(8)]
    texts = engine.run(requests)
    few = -(-1 // engine.rows) * engine.rows
    assert reads == [(8, 1)] * 5 + [(few, 1)] * 25
    alone = Engine(net, TOKENIZER, slots=8).run([requests[7]])[0]
    assert texts[7].tokens == alone.tokens


def test_a_text_that_has_ended_is_not_looked_at() -> None:
    engine = Engine(made("documents"), TOKENIZER, slots=4)
    keys: list[int] = []
    assert engine.cache is not None
    long = engine.submit(Request(prompt=[1], max_new_tokens=80))
    short = engine.submit(Request(prompt=[2], max_new_tokens=90))
    while not long.finished:
        engine.step()
    engine.cancel(short)
    engine.net.register_forward_hook(lambda net, inputs, out: keys.append(engine.cache._keys))  # type: ignore[union-attr]
    engine.run([Request(prompt=[3], max_new_tokens=4, seed=i) for i in range(4)])
    assert set(keys) == {64}


def test_memory_is_taken_at_the_start_and_never_grows() -> None:
    engine = Engine(made(), TOKENIZER, slots=8)
    before = engine.memory
    assert before >= 8 * BLOCK * 2 * 2 * 48 * 4  # slots, tokens, layers, keys and values, channels, bytes
    engine.run([drawn(random.Random(i)) for i in range(30)])
    assert engine.memory == before


def test_text_comes_as_it_is_certain() -> None:
    engine = Engine(made(), TOKENIZER)
    text = engine.submit(Request(prompt=[1, 2], seed=5, max_new_tokens=50))
    pieces = []
    while engine.busy:
        engine.step()
        pieces.append(text.take())
    assert "".join(pieces) == text.text == TOKENIZER.decode(text.tokens) and len(pieces) == 50


def test_rows_are_tried() -> None:
    """A network whose rows depend on how many there are is always given all of them."""

    class Uneven(GPT):
        def forward(self, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
            return super().forward(tokens, cache) * (1 + 1e-6 * len(tokens))

    torch.manual_seed(0)
    assert steady_rows(Uneven(V, BLOCK, n_layer=1, n_head=1, n_embd=8), 12) == 12
    assert steady_rows(made(dtype=torch.float64), 12) <= 8


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": [1], "stop": ("",)}, "stop has an empty string"),
        ({"prompt": [1], "stop": "ab"}, "stop is 'ab': give a tuple of strings"),
        ({"prompt": [1], "logprobs": -1}, "logprobs is -1"),
        ({"prompt": [1], "seed": 2**64}, "seed is 18446744073709551616: it must fit"),
    ],
)
def test_bad_requests(request_: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Request(**request_)


@pytest.mark.parametrize("prompt", [[V], [1, -1], [1] * BLOCK + [V + 1]])
def test_unknown_ids_are_refused_before_they_harm_others(prompt: list[int]) -> None:
    engine = Engine(made(), TOKENIZER)
    good = engine.submit(Request(prompt=[1], max_new_tokens=3))
    with pytest.raises(UserError, match=rf"id {max(prompt) if max(prompt) >= V else -1}: ids are at least 0"):
        engine.submit(Request(prompt=prompt))
    engine.run([])
    assert good.finished == "length"


def test_a_network_that_diverged() -> None:
    net = made()
    torch.nn.init.constant_(net.lm_head.weight, torch.nan)
    with pytest.raises(CheckError, match="not finite"):
        Engine(net, TOKENIZER).run([Request(prompt=[1])])


def test_log_probabilities_are_the_networks() -> None:
    net = made(dtype=torch.float64)
    request = Request(prompt=[1, 2, 3], sampler=Sampler(temperature=2.0, top_k=5), max_new_tokens=20, logprobs=4)
    (text,) = Engine(net, TOKENIZER).run([request])
    with torch.inference_mode():
        logs = net(torch.tensor([[1, 2, 3, *text.tokens]]))[0, 2:-1].log_softmax(-1)  # (T, V)
    for row, token, (own, likeliest) in zip(logs, text.tokens, text.logprobs, strict=True):
        assert own == pytest.approx(float(row[token]), rel=1e-5)
        assert list(likeliest) == row.topk(4).indices.tolist()
        assert list(likeliest.values()) == pytest.approx(row.topk(4).values.tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt", "window", "beyond"])
@torch.inference_mode()
def test_what_requests_add_to_logits(kind: str) -> None:
    """Counts are of the continuation alone, with a cache, without one, and where the context has moved on."""
    torch.manual_seed(5)
    net = made(dtype=torch.float64) if kind != "window" else MLP(V, 8).double().eval()
    prompt = [3, 4, 5] if kind != "beyond" else [i % V for i in range(BLOCK - 3)]
    bias = ((7, 2.5), (8, -100.0))
    request = Request(
        prompt=prompt, sampler=Sampler(temperature=0), max_new_tokens=30, logit_bias=bias, presence_penalty=1.25,
        frequency_penalty=0.5, logprobs=0,
    )  # fmt: skip
    text = Engine(net, TOKENIZER, slots=2).run([request, Request(prompt=[1], max_new_tokens=9)])[0]
    tokens = list(prompt)
    for i in range(30):
        out = net(torch.tensor([tokens[-net.block_size :]]))
        logits = (out[0, -1] if out.ndim == 3 else out[0]).float()
        expected = float(logits.log_softmax(0)[text.tokens[i]])
        assert text.logprobs[i][0] == pytest.approx(expected, rel=1e-4), "the network's, whatever is added"
        for token, value in bias:
            logits[token] += value
        for token in set(text.tokens[:i]):
            logits[token] -= 1.25 + 0.5 * text.tokens[:i].count(token)
        assert int(logits.argmax()) == text.tokens[i], i
        tokens.append(text.tokens[i])


def test_a_step_makes_one_token_of_a_text() -> None:
    """Also where it grows beyond the context, from where on it is read alone: else its end would be told twice."""
    engine = Engine(made(), TOKENIZER, slots=2)
    text = engine.submit(Request(prompt=[1] * (BLOCK - 3), max_new_tokens=8))
    while engine.busy:
        before = len(text.tokens)
        assert engine.step().count(text) == len(text.tokens) - before <= 1


def test_where_tokens_begin() -> None:
    text = Engine(made(), TOKENIZER).run([Request(prompt=[1], max_new_tokens=20, stop=("a",), seed=3)])[0]
    assert text.starts == list(range(len(text.tokens)))
