"""A network that reads its text in pieces, with a cache, computes what it computes from the whole."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.generation import Sampler, generate
from lm.models import GPT, GRU, LSTM, RNN, BagOfWords, GatedWaveNet, Seq2Seq, WaveNet
from lm.models.cache import Cache
from lm.models.masks import same_document

V, T = 11, 24
END = 3
SETTINGS = st.fixed_dictionaries(
    {
        "positions": st.sampled_from(["learned", "rotary", "none"]),
        "n_kv_head": st.sampled_from([None, 1, 2]),
        "qk_norm": st.booleans(),
        "norm": st.sampled_from(["layer", "rms", "none"]),
        "norm_position": st.sampled_from(["pre", "post"]),
        "feed_forward": st.sampled_from(["gelu", "swiglu", "single", "none"]),
        "document_end": st.sampled_from([None, END]),
        "logit_soft_cap": st.sampled_from([None, 5.0]),
        "residual": st.booleans(),
        "token_shift": st.booleans(),
    }
).filter(lambda one: one["norm"] != "none" or one["norm_position"] == "pre")


def made(seed: int = 0, **settings: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(V, T, n_layer=2, n_head=4, n_embd=16, init_std=0.5, **settings).double().eval()


def in_pieces(net: Any, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = Cache(T)
    parts = tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1)
    return torch.cat([net(part, cache) for part in parts], dim=1)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[int, list[int]]:
    length = draw(st.integers(2, T))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=6)))
    return length, [b - a for a, b in zip([0, *cuts], cuts, strict=False)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(settings=SETTINGS, pieces=pieces(), batch=st.integers(1, 3), seed=st.integers(0, 99))
@torch.inference_mode()
def test_pieces_are_the_whole(settings: dict[str, Any], pieces: tuple[int, list[int]], batch: int, seed: int) -> None:
    net = made(seed, **settings)
    length, sizes = pieces
    tokens = torch.randint(V, (batch, length))
    torch.testing.assert_close(in_pieces(net, tokens, sizes), net(tokens), rtol=1e-10, atol=1e-10)


@torch.inference_mode()
def test_keys_that_heads_share_are_not_copied_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens, cache = made(n_kv_head=2, document_end=END), torch.randint(V, (3, 9)), Cache(T)
    net(tokens[:, :8], cache)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", None, raising=False)
    last = net(tokens[:, 8:], cache)
    monkeypatch.undo()
    torch.testing.assert_close(last, net(tokens)[:, 8:], rtol=1e-10, atol=1e-10)


def test_masks_of_documents_are_made_for_new_tokens_alone() -> None:
    tokens, cache = torch.randint(V, (3, T)), Cache(T)
    cache.place(tokens[:, :20], END)
    _, allowed = cache.place(tokens[:, 20:], END)
    assert allowed is not None and torch.equal(allowed, same_document(tokens, END)[:, :, 20:])
    assert allowed.untyped_storage().nbytes() == 3 * 4 * T


@torch.inference_mode()
def test_logits_of_the_last_tokens_alone() -> None:
    net, tokens = made(), torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = Cache(T, last=2)
    found = [net(tokens[:, :6], cache), net(tokens[:, 6:7], cache), net(tokens[:, 7:], cache)]
    torch.testing.assert_close(torch.cat(found, dim=1), net(tokens)[:, 4:], rtol=1e-10, atol=1e-10)


OTHERS: dict[str, Any] = {
    **{kind.__name__: partial(kind, V, T, n_embd=6, n_hidden=8, n_layer=2) for kind in (RNN, GRU, LSTM)},
    "bag of words": lambda: BagOfWords(V, T, n_embd=6, n_hidden=8),
    "gated": lambda: GatedWaveNet(V, T, n_embd=8, n_layer=3, n_stack=2),
    "dense": lambda: WaveNet(V, T, n_embd=6, n_hidden=10, fuse=2, depth=3, dense=True),
    "dense by threes": lambda: WaveNet(V, T, n_embd=6, n_hidden=10, fuse=3, depth=2, dense=True),
    "source and target": lambda: Seq2Seq(V, T, n_layer=2, n_head=2, n_embd=8, start_token=1, pad_token=2),
    "heads apart": lambda: GPT(V, T, n_layer=2, n_head=4, n_embd=16, attention="separate"),
}


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(pieces=pieces(), batch=st.integers(1, 3), seed=st.integers(0, 99))
@torch.inference_mode()
def test_other_networks_too(name: str, pieces: tuple[int, list[int]], batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = OTHERS[name]().double()
    net(torch.randint(V, (4, T)))  # BatchNorm's running statistics
    net.eval()
    for parameter in net.parameters():
        parameter.normal_(std=0.4)
    length, sizes = pieces
    tokens = torch.randint(V, (batch, length))
    cached, whole = in_pieces(net, tokens, sizes), net(tokens)
    if name == "source and target":  # logits at source positions mean nothing
        known = (tokens == 1).cumsum(1) > 0
        cached, whole = cached[known], whole[known]
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-10)


@torch.inference_mode()
def test_contexts_of_a_fixed_length() -> None:
    """WaveNet without dense has logits for its last position alone."""
    net = WaveNet(V, 8, n_embd=6, n_hidden=10).double().eval()
    tokens, cache = torch.randint(V, (2, 8)), Cache(8)
    for i in range(8):
        torch.testing.assert_close(net(tokens[:, i : i + 1], cache), net(tokens[:, : i + 1]), rtol=1e-10, atol=0)


@torch.inference_mode()
def test_what_was_read_matters() -> None:
    """The comparison can fail: a cache that forgets gives other logits."""
    net, tokens = made(positions="rotary"), torch.randint(V, (1, T))
    alone = torch.cat([net(part) for part in tokens.split(8, dim=1)], dim=1)
    assert (alone - net(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_text_is_that_without_a_cache(positions: str, temperature: float) -> None:
    """Also where it grows beyond the network's context, and from a prompt that is longer already."""
    net = made(positions=positions, document_end=END)
    forward = net.forward

    def plain(tokens: torch.Tensor) -> torch.Tensor:
        return forward(tokens)

    def text(prompt: torch.Tensor) -> list[list[int]]:
        sampler, generator = Sampler(temperature=temperature), torch.Generator().manual_seed(5)
        tokens = generate(net, prompt, sampler=sampler, generator=generator)
        return [next(tokens).tolist() for _ in range(2 * T)]

    prompts = [torch.randint(V, (3, length)) for length in (1, T // 2, T, T + 5)]
    with_cache = [text(prompt) for prompt in prompts]
    net.forward = plain  # type: ignore[method-assign]
    assert [text(prompt) for prompt in prompts] == with_cache


@pytest.mark.parametrize("name", [*OTHERS, "shared keys"])
def test_samples_of_a_prompt_read_it_once(name: str) -> None:
    net = OTHERS[name]().double().eval() if name in OTHERS else made(n_kv_head=2, document_end=END)
    forward, prompt = net.forward, torch.tensor([[4, 1, 5, 6, 1, 7]]).repeat(3, 1)
    reads: list[tuple[int, ...]] = []

    def text(read: Any) -> list[list[int]]:
        net.forward = read
        tokens = generate(net, prompt, sampler=Sampler(), generator=torch.Generator().manual_seed(2))
        return [next(tokens).tolist() for _ in range(T)]

    def noted(tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        reads.append(tuple(tokens.shape))
        return forward(tokens, cache)  # type: ignore[no-any-return]

    with_cache = text(lambda tokens, cache=None: noted(tokens, cache) if cache else forward(tokens))
    assert with_cache == text(lambda tokens: forward(tokens)) and len(set(zip(*with_cache, strict=True))) == 3
    assert reads == [(1, 6)] + [(3, 1)] * (T - 6)


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens are more than the cache's 24"):
        in_pieces(made(), torch.randint(V, (1, T + 1)), [T])
