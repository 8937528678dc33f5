import math

import pytest
import torch
from torch.nn import functional as F

from lm.models import GPT, Bigram
from lm.models.gpt import CausalSelfAttention

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_untrained_loss_is_that_of_a_uniform_guess(bias: bool, tie_weights: bool) -> None:
    net = GPT(65, 16, **SMALL, bias=bias, tie_weights=tie_weights)
    tokens, targets = torch.randint(65, (2, 8, 16))
    logits = net(tokens).detach()
    assert logits.shape == (8, 16, 65)
    assert float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())) == pytest.approx(math.log(65), abs=0.03)


def test_untrained_bigram_loss_is_exactly_uniform() -> None:
    tokens, targets = torch.randint(65, (2, 8, 16))
    logits = Bigram(65, 16).double()(tokens).detach()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(loss) == pytest.approx(math.log(65), rel=1e-12)


def test_no_position_sees_a_later_one() -> None:
    net = GPT(65, 16, **SMALL).double().eval()
    tokens = torch.randint(65, (1, 16))
    before = net(tokens)
    for t in range(1, 16):
        changed = tokens.clone()
        changed[0, t:] = (changed[0, t:] + 1) % 65
        after = net(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_attention_is_softmax_of_scaled_products_over_the_past() -> None:
    attention = CausalSelfAttention(n_embd=12, n_head=3, dropout=0.0, bias=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.c_attn(x).split(12, dim=2)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    expected = attention.c_proj(torch.cat(heads, dim=2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_gpt2_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        net = GPT(50257, 1024)
    assert sum(p.numel() for p in net.parameters()) == 124_439_808


def test_initialisation_is_gpt2s() -> None:
    net = GPT(1000, 256, n_layer=8, n_head=4, n_embd=128)
    assert float(net.wte.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(net.wpe.weight.std()) == pytest.approx(0.02, rel=0.05)
    for block in net.h:
        assert float(block.attn.c_attn.weight.std()) == pytest.approx(0.02, rel=0.05)
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            assert float(projection.weight.std()) == pytest.approx(0.02 / 4, rel=0.05)
            assert not projection.bias.any()


def test_tied_head_is_the_embedding_itself() -> None:
    tied, untied = GPT(65, 16, **SMALL), GPT(65, 16, **SMALL, tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight


@pytest.mark.parametrize("place", ["drop", "h.0.attn.resid_dropout", "h.0.mlp.dropout", "h.0.attn"])
def test_dropout_acts_in_its_place_and_only_in_training(place: str) -> None:
    net = GPT(65, 16, **SMALL, dropout=0.5)
    for name, module in net.named_modules():  # leave it on in one place alone
        if isinstance(module, torch.nn.Dropout) and name != place:
            module.p = 0.0
        if isinstance(module, CausalSelfAttention) and name != place:
            module.dropout = 0.0
    tokens = torch.randint(65, (2, 16))
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 30}, "n_head 4 does not divide n_embd 30"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_sizes_are_refused_with_their_numbers(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(65, 16, **(SMALL | settings))


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        GPT(65, 16, **SMALL)(torch.zeros(1, 17, dtype=torch.int64))
