import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lm.models.seq2seq import Attention, Seq2Seq

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 16}
PAD, START = 8, 9  # letters are 0 to 7
V, BLOCK = 11, 16
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(**settings: object) -> Seq2Seq:
    """A float64 network with weights so large that every one of its paths shows in the logits."""
    net = Seq2Seq(V, BLOCK, **(SMALL | {"start_token": START, "pad_token": PAD} | settings)).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net


def row(*parts: int | list[int]) -> Tensor:
    return torch.tensor([[t for part in parts for t in (part if isinstance(part, list) else [part])]])


def target_logits(net: Seq2Seq, tokens: Tensor) -> Tensor:
    """The logits of one row from its start token on."""
    start = tokens[0].tolist().index(START)
    return net(tokens).detach()[0, start:]


@pytest.mark.parametrize("bias", [True, False])
def test_untrained_loss_is_that_of_a_uniform_guess(bias: bool) -> None:
    net = Seq2Seq(65, 16, **SMALL, bias=bias, start_token=64)
    tokens, targets = torch.randint(65, (2, 32, 12))
    logits = net(tokens).detach()
    assert logits.shape == (32, 12, 65) and logits.dtype == torch.float32
    assert float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())) == pytest.approx(math.log(65), abs=0.03)


@pytest.mark.parametrize("source", [[3], [1, 2, 3, 4], [5, 5, 0, 1, 7, 6]])
@pytest.mark.parametrize("target", [[], [4, 3], [4, START, 3, PAD, 10]])
def test_logits_are_those_of_an_encoder_and_a_decoder_run_apart(source: list[int], target: list[int]) -> None:
    net = network()
    source_tokens, target_tokens = row(source), row(START, target)
    S, T = source_tokens.shape[1], target_tokens.shape[1]  # noqa: N806
    memory = net.wte(source_tokens) + net.wpe_encoder.weight[:S]
    for block in net.encoder:
        memory = block(memory, torch.ones(S, S, dtype=torch.bool))  # both directions
    memory = net.ln_encoder(memory)
    x = net.wte(target_tokens) + net.wpe_decoder.weight[:T]  # counted from the start token
    for block in net.decoder:
        x = block(x, memory, torch.ones(T, T, dtype=torch.bool).tril(), torch.ones(T, S, dtype=torch.bool))
    expected = (net.ln_f(x) @ net.wte.weight.T)[0].detach()
    torch.testing.assert_close(target_logits(net, row(source, START, target)), expected, **EXACT)


def test_attention_is_softmax_of_scaled_products_where_the_mask_allows() -> None:
    attention = Attention(n_embd=12, n_head=3, dropout=0.0, bias=True).double()
    x, memory = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[..., 0] = True
    q, (k, v) = attention.c_q(x), attention.c_kv(memory).split(12, dim=2)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = (q[..., part] @ k[..., part].mT / math.sqrt(4)).masked_fill(~mask[:, 0], -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    expected = attention.c_proj(torch.cat(heads, dim=2))
    torch.testing.assert_close(attention(x, memory, mask), expected, **EXACT)
    mask[1, 0, 3] = False  # one position of one row may look at nothing
    expected[1, 3] = attention.c_proj.bias
    torch.testing.assert_close(attention(x, memory, mask), expected, **EXACT)


@pytest.mark.parametrize("pads", [1, 2, 7])
def test_pads_before_the_start_token_change_nothing(pads: int) -> None:
    net = network()
    source, target = [1, 2, 3, 4], [4, 3, 2]
    before = target_logits(net, row(source, START, target))
    padded = row(source, [PAD] * pads, START, target)
    torch.testing.assert_close(target_logits(net, padded), before, **EXACT)
    counted = network(pad_token=None)
    counted.load_state_dict(net.state_dict())
    assert not torch.isclose(target_logits(counted, padded), before).all(dim=1).any()


def test_no_target_position_sees_a_later_one() -> None:
    net = network()
    tokens = row([1, 2, 3, 4], START, [4, 3, 2, 1, 10, 5])
    before = net(tokens)
    for t in range(5, tokens.shape[1]):
        for shift in (1, 4):
            changed = tokens.clone()
            changed[0, t:] = (changed[0, t:] + shift) % V
            after = net(changed)
            torch.testing.assert_close(after[:, 4:t], before[:, 4:t], **EXACT)
            assert not torch.isclose(after[0, t:], before[0, t:]).all(dim=1).any()
        torch.testing.assert_close(net(tokens[:, :t])[:, 4:], before[:, 4:t], **EXACT)  # nor that it is there


def test_every_target_position_sees_every_source_token() -> None:
    net = network()
    source, target = [1, 2, 3, 4, 5], [5, 4, 3]
    before = target_logits(net, row(source, START, target))
    for s in range(len(source)):
        changed = [*source[:s], 7, *source[s + 1 :]]
        after = target_logits(net, row(changed, START, target))
        assert not torch.isclose(after, before).all(dim=1).any()
    swapped = target_logits(net, row([2, 1, 3, 4, 5], START, target))  # and where it stands
    assert not torch.isclose(swapped, before).all(dim=1).any()


def test_rows_of_a_batch_are_independent() -> None:
    net = network()
    length = 12
    rows = [
        row([1, 2, 3], START, [3, 2, 1, 10]),
        row([5], START, [5, 10]),
        row([1, 2, 3, 4, 5, 6], START, [6, 5, 4, 3, 2]),
        row(START, [6, 5, 4]),
    ]
    batch = torch.cat([F.pad(tokens, (0, length - tokens.shape[1]), value=PAD) for tokens in rows])
    logits = net(batch)
    for tokens, together in zip(rows, logits, strict=True):
        start, end = tokens[0].tolist().index(START), tokens.shape[1]
        torch.testing.assert_close(together[start:end], target_logits(net, tokens), **EXACT)


def test_an_empty_source_is_one_of_pads_alone() -> None:
    net = network()
    empty = target_logits(net, row(START, [4, 3, 2]))
    assert empty.isfinite().all()
    for pads in (1, 3):
        torch.testing.assert_close(target_logits(net, row([PAD] * pads, START, [4, 3, 2])), empty, **EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_are_finite_whatever_a_row_lacks(training: bool) -> None:
    net = network(dropout=0.1).train(training)
    tokens = torch.tensor(
        [
            [1, 2, 3, START, 3, 2],
            [1, 2, 3, 4, 5, 6],  # no start token
            [START, 1, 2, 3, 4, 5],  # no source
            [PAD, PAD, PAD, START, 1, 2],  # a source of pads
            [PAD] * 6,  # nothing at all
            [1, 2, 3, 4, PAD, START],  # a target of nothing yet
        ]
    )
    for lone in (tokens, *tokens.split(1)):
        net.zero_grad()
        logits = net(lone)
        assert logits.isfinite().all()
        F.cross_entropy(logits.flatten(0, 1), lone.flatten()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_number_of_parameters(bias: bool) -> None:
    C, N, b = 16, 3, int(bias)  # noqa: N806
    net = Seq2Seq(V, BLOCK, n_layer=N, n_head=4, n_embd=C, bias=bias, start_token=START)
    norm = C + b * C
    attention = 4 * C * C + b * 4 * C
    mlp = 8 * C * C + b * 5 * C
    encoder, decoder = N * (attention + mlp + 2 * norm) + norm, N * (2 * attention + mlp + 3 * norm) + norm
    assert sum(p.numel() for p in net.parameters()) == V * C + 2 * BLOCK * C + encoder + decoder
    assert net.lm_head.weight is net.wte.weight


def test_initialisation_scales_each_stacks_residual_projections() -> None:
    net = Seq2Seq(1000, 256, n_layer=3, n_head=4, n_embd=128, start_token=0)
    for embedding in (net.wte, net.wpe_encoder, net.wpe_decoder):
        assert float(embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for stack, branches in ((net.encoder, 6), (net.decoder, 9)):
        linears = {n: m for n, m in stack.named_modules() if isinstance(m, torch.nn.Linear)}
        assert sum(name.endswith("c_proj") for name in linears) == branches
        for name, linear in linears.items():
            std = 0.02 / math.sqrt(branches) if name.endswith("c_proj") else 0.02
            assert float(linear.weight.detach().std()) == pytest.approx(std, rel=0.05), name
            assert not linear.bias.any()


@pytest.mark.parametrize(
    "place",
    [
        "drop",
        "encoder.0.attn.dropout",
        "encoder.0.attn.resid_dropout",
        "encoder.0.mlp.dropout",
        "decoder.0.attn.dropout",
        "decoder.0.cross_attn.dropout",
        "decoder.0.cross_attn.resid_dropout",
        "decoder.0.mlp.dropout",
    ],
)
def test_dropout_acts_in_its_place_and_only_in_training(place: str) -> None:
    net = network(dropout=0.5).train()
    for name, module in net.named_modules():  # leave it on in one place alone
        if isinstance(module, torch.nn.Dropout) and name != place:
            module.p = 0.0
    tokens = row([1, 2, 3, 4], START, [4, 3, 2])
    assert not torch.equal(target_logits(net, tokens), target_logits(net, tokens))
    net.eval()
    assert torch.equal(target_logits(net, tokens), target_logits(net, tokens))


def test_both_embeddings_are_dropped_out() -> None:
    net = network(dropout=0.5)
    seen = {}
    net.drop.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    net.encoder[0].register_forward_pre_hook(lambda module, inputs: seen.update(encoder=inputs[0]))
    net.decoder[0].register_forward_pre_hook(lambda module, inputs: seen.update(decoder=inputs[0]))
    net(row([1, 2, 3], START, [3, 2]))
    assert not seen["encoder"].any() and not seen["decoder"].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 30}, "n_head 4 does not divide n_embd 30: choose"),
        ({"n_layer": 0}, "n_layer is 0: it must be at least 1"),
        ({"n_head": -1}, "n_head is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"dropout": 1.0}, "dropout is 1: it must be"),
        ({"start_token": 11}, "start_token is 11: it must be at least 0 and below vocab_size 11"),
        ({"start_token": -1}, "start_token is -1"),
        ({"pad_token": 11}, "pad_token is 11"),
        ({"pad_token": START}, "start_token and pad_token are both 9: choose two"),
    ],
)
def test_bad_settings_are_refused_with_their_values(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seq2Seq(**({"vocab_size": V, "block_size": BLOCK, "start_token": START, "pad_token": PAD} | SMALL | settings))


def test_a_stream_longer_than_block_size_is_refused() -> None:
    net = network()
    assert (net.vocab_size, net.block_size) == (V, BLOCK)
    assert net(torch.zeros(1, BLOCK, dtype=torch.int64)).shape == (1, BLOCK, V)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        net(torch.zeros(1, BLOCK + 1, dtype=torch.int64))


@pytest.mark.slow
def test_it_learns_to_reverse_strings() -> None:
    letters = "abcdefgh_>."  # the pad, the start and the end token are the last three
    chance = random.Random(0)

    def string() -> str:
        return "".join(chance.choices("abcdefgh", k=chance.randint(3, 6)))

    def encode(texts: list[str], width: int) -> Tensor:
        return torch.tensor([[letters.index(c) for c in text.ljust(width, "_")] for text in texts])

    unseen: dict[str, None] = {}
    while len(unseen) < 500:
        unseen[string()] = None
    steps, lr = 300, 3e-3
    net = Seq2Seq(len(letters), 14, n_layer=2, n_head=4, n_embd=64, start_token=START, pad_token=PAD)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 50, 1 - step / steps)
        sources = [s for s in (string() for _ in range(64)) if s not in unseen]
        tokens = encode([f"{s}>{s[::-1]}." for s in sources], 14)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
        targets[(inputs == START).cumsum(1) == 0] = PAD  # nothing is asked of the source
        loss = F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    tokens = encode([s.ljust(6, "_") + ">" for s in unseen], 7)
    with torch.no_grad():
        for _ in range(7):  # greedily
            tokens = torch.cat([tokens, net(tokens)[:, -1:].argmax(-1)], dim=1)
    written = ["".join(letters[t] for t in line).partition(".")[0] for line in tokens[:, 7:].tolist()]
    right = sum(w == s[::-1] for w, s in zip(written, unseen, strict=True))
    assert right >= 495, f"{right} of 500 strings reversed"
