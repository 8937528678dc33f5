import math
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.init import _EmptyInit
from torch.nn import functional as F

from lm.models import GPT, Bigram
from lm.models.attention import CausalSelfAttention, SeparateHeads
from lm.models.feed_forward import make_feed_forward
from lm.models.rotary import Rotary
from tests.conftest import ROOT

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu", "bias": False, "tie_weights": False}
VARIANTS = {
    "gpt2": {},
    "llama": LLAMA | {"n_kv_head": 2},
    "separate": {"attention": "separate"},
    "bare-head": {
        "attention": "separate",
        "projection": False,
        "feed_forward": "none",
        "residual": False,
        "norm": "none",
    },
    "single": {"feed_forward": "single", "attention_bias": False, "init_std": None, "tie_weights": False},
    "relu": {"feed_forward": "relu", "hidden_size": 24, "head_bias": True},
    "relu-squared": {"feed_forward": "relu_squared", "norm": "rms"},
    "swiglu": {"feed_forward": "swiglu"},
    "post": {"norm_position": "post"},
    "rotary": {"positions": "rotary", "rope_theta": 100.0},
    "no-positions": {"positions": "none"},
    "qk-norm": LLAMA | {"qk_norm": True},
    "one-kv-head": {"n_kv_head": 1},
    "soft-cap": {"logit_soft_cap": 1.0},
    "shift": {"token_shift": True},
    "shift-alone": {"token_shift": True, "feed_forward": "none"},
}


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


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_no_position_sees_a_later_one(settings: dict) -> None:
    net = GPT(65, 16, **SMALL, **settings).double().eval()
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
    assert net.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.wpe.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in net.h:
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
            assert not projection.bias.any()


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_network_whose_weights_are_to_be_loaded_draws_none(settings: dict) -> None:
    drawn, before = GPT(65, 16, **SMALL, **settings), torch.get_rng_state()
    with _EmptyInit():  # as runs do that go on, and what uses a checkpoint
        net = GPT(65, 16, **SMALL, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    net.load_state_dict(drawn.state_dict())
    tokens = torch.randint(65, (2, 16))
    assert torch.equal(net.eval()(tokens), drawn.eval()(tokens))  # what is no part of the state is there, too


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_each_parameter_is_used(settings: dict) -> None:
    net = GPT(65, 16, **SMALL, **settings)
    net(torch.randint(65, (2, 16))).square().sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_tied_head_is_the_embedding_itself() -> None:
    tied, untied = GPT(65, 16, **SMALL), GPT(65, 16, **SMALL, tie_weights=False)
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("drop", {}),
        ("h.0.attn.resid_dropout", {}),
        ("h.0.mlp.dropout", {}),
        ("h.0.attn", {}),
        ("h.0.attn.key_dropout", {"key_dropout": True}),
        ("h.0.attn.heads.3.dropout", {"attention": "separate"}),
        ("h.0.attn.resid_dropout", {"attention": "separate"}),
        ("h.0.mlp.dropout", {"feed_forward": "swiglu"}),
        ("h.0.mlp.dropout", {"feed_forward": "single"}),
    ],
)
def test_dropout_acts_in_its_place_and_only_in_training(place: str, settings: dict) -> None:
    net = GPT(65, 16, **SMALL, **settings, dropout=0.5)
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
        ({"dropout": 1.0}, "dropout is 1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"n_kv_head": 0}, "n_kv_head is 0: it must be at least 1"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap is 0: it must be above 0"),
        ({"init_std": 0.0}, "init_std is 0: it must be above 0"),
        ({"positions": "rotary", "n_embd": 36}, "n_embd / n_head is 9: make it even"),
        ({"positions": "rotary", "rope_theta": 0.0}, "rope_theta is 0: it must be above 0"),
        ({"norm": "batch"}, "norm is batch: choose from layer, rms, none"),
        ({"attention": "separate", "n_kv_head": 2}, "n_kv_head 2 needs attention batched"),
        ({"attention": "separate", "qk_norm": True}, "qk_norm True needs attention batched"),
        ({"attention": "separate", "positions": "rotary"}, "positions rotary needs attention batched"),
        ({"feed_forward": "single", "hidden_size": 8}, "hidden_size 8 with feed_forward single"),
        ({"feed_forward": "none", "hidden_size": 8}, "hidden_size 8 with feed_forward none"),
        ({"norm": "none", "norm_position": "post"}, "norm_position post with norm none"),
    ],
)
def test_bad_settings_are_refused_with_their_values(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(65, 16, **(SMALL | settings))


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        GPT(65, 16, **SMALL)(torch.zeros(1, 17, dtype=torch.int64))


def test_default_weights_have_gpt2s_names_in_gpt2s_order() -> None:
    weights = []
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        weights += [f"h.0.{layer}.weight", f"h.0.{layer}.bias"]
    expected = ["wte.weight", "wpe.weight", *weights, "ln_f.weight", "ln_f.bias", "lm_head.weight"]
    assert list(GPT(65, 16, n_layer=1, n_head=4, n_embd=32).state_dict()) == expected


@pytest.mark.parametrize(
    ("rung", "parameters"),
    [  # 65 symbols: embeddings 2080 + 256, head 2145; queries, keys and values 3072
        ("one-head", 4481 + 3072),
        ("four-heads", 4481 + 3072),
        ("feed-forward", 4481 + 3072 + 1056),
        ("blocks", 4481 + 3 * (3072 + 1056 + 4224 + 4128)),
        ("layernorm", 4481 + 3 * (3072 + 1056 + 4224 + 4128 + 128) + 64),
    ],
)
def test_rungs_of_the_ladder_have_their_number_of_parameters(rung: str, parameters: int) -> None:
    recipe = yaml.safe_load((ROOT / f"configs/ladder/{rung}.yaml").read_text())
    net = GPT(65, recipe["data"]["init_args"]["block_size"], **recipe["model"]["init_args"]["net"]["init_args"])
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_the_lectures_network_has_its_published_number_of_parameters() -> None:
    recipe = yaml.safe_load((ROOT / "configs/ladder/layernorm.yaml").read_text())
    settings = recipe["model"]["init_args"]["net"]["init_args"] | {"n_layer": 4, "n_embd": 64}
    assert sum(p.numel() for p in GPT(65, 32, **settings).parameters()) == 209_729


def test_llama_has_no_bias_and_its_matrices() -> None:
    recipe = yaml.safe_load((ROOT / "configs/llama.yaml").read_text())
    net = GPT(65, 64, **recipe["model"]["init_args"]["net"]["init_args"])
    assert not [name for name, _ in net.named_parameters() if "bias" in name or "wpe" in name]
    block = {name: tuple(p.shape) for name, p in net.h[0].named_parameters()}
    assert block == {
        "ln_1.weight": (128,),
        "attn.c_attn.weight": (128 + 2 * 64, 128),
        "attn.c_proj.weight": (128, 128),
        "ln_2.weight": (128,),
        "mlp.w_gate.weight": (344, 128),
        "mlp.w_up.weight": (344, 128),
        "mlp.c_proj.weight": (128, 344),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("projection", [True, False])
def test_separate_heads_compute_what_batched_heads_do(dtype: torch.dtype, tolerance: float, projection: bool) -> None:
    settings = {"n_embd": 12, "n_head": 3, "dropout": 0.0, "bias": True, "projection": projection}
    separate, batched = SeparateHeads(**settings).to(dtype), CausalSelfAttention(**settings).to(dtype)
    batched.c_proj.load_state_dict(separate.c_proj.state_dict())
    layers = [getattr(head, name) for name in ("query", "key", "value") for head in separate.heads]
    batched.c_attn.load_state_dict(
        {"weight": torch.cat([layer.weight for layer in layers]), "bias": torch.cat([layer.bias for layer in layers])}
    )
    x = torch.randn(2, 5, 12, dtype=dtype)
    torch.testing.assert_close(separate(x), batched(x), rtol=0, atol=tolerance)
    torch.testing.assert_close(separate.weights(x), batched.weights(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_attention_maps_are_the_weights_that_the_blocks_use(settings: dict) -> None:
    net = GPT(65, 16, **SMALL, **settings, dropout=0.5).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from uniform attention
    tokens = torch.randint(65, (3, 11))
    maps = net.attention_maps(tokens)
    assert net.training and net.h[1].attn.training
    net.eval()
    seen = []
    hooks = [b.attn.register_forward_hook(lambda attn, args, y: seen.append((attn, *args, y))) for b in net.h]
    net(tokens)
    for hook in hooks:
        hook.remove()
    for weights, (attn, x, y) in zip(maps, seen, strict=True):
        assert weights.shape == (3, 4, 11, 11) and not weights.requires_grad
        if isinstance(attn, SeparateHeads):
            v = torch.stack([head.value(x) for head in attn.heads], dim=1)
        else:
            v = attn.qkv(x)[2]
        torch.testing.assert_close(attn.c_proj((weights @ v).transpose(1, 2).flatten(2)), y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 11).double(), rtol=1e-12, atol=0)
        assert not weights.triu(1).any()
        assert weights[:, :, 5, :6].std().item() > 0.01


def test_rotary_turns_pairs_by_the_position_times_their_frequency() -> None:
    rotary = Rotary(head_size=8, block_size=10, theta=100.0).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    angles = torch.arange(7).double()[:, None] / 100.0 ** (torch.arange(4).double() / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotary(x), torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-5, atol=1e-5)


def test_rotary_keeps_lengths_and_scores_know_distances_alone() -> None:
    rotary = Rotary(head_size=8, block_size=40)
    q, k = torch.randn(2, 6, 8)

    def placed(x: torch.Tensor, start: int) -> torch.Tensor:
        return rotary(F.pad(x, (0, 0, start, 0)))[start:]

    torch.testing.assert_close(placed(q, 9).norm(dim=-1), q.norm(dim=-1))
    scores = rotary(q) @ rotary(k).mT
    torch.testing.assert_close(placed(q, 30) @ placed(k, 30).mT, scores, rtol=1e-4, atol=1e-4)
    assert float((placed(q, 1) @ rotary(k).mT - scores).abs().max()) > 0.1
    torch.testing.assert_close(rotary(q)[0], q[0])


def test_rotary_tables_are_float32_and_not_saved() -> None:
    net = GPT(65, 16, **SMALL, **LLAMA)
    assert net.h[0].attn.rotary.cos.dtype == torch.float32
    assert not [name for name in net.state_dict() if "rotary" in name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        rotary = Rotary(head_size=8, block_size=300)
    finally:
        torch.set_default_dtype(default)
    assert rotary.cos.dtype == torch.float32
    torch.testing.assert_close(rotary.cos[:, 0], torch.arange(300.0).cos())
    assert rotary(torch.randn(300, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", ["none", "rotary", "learned"])
def test_without_positions_the_order_of_the_past_is_lost(positions: str) -> None:
    net = GPT(65, 16, **(SMALL | {"n_layer": 1}), positions=positions, init_std=1.0).double()
    tokens = torch.randint(65, (1, 16))
    shuffled = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    same = torch.allclose(net(tokens)[:, -1], net(shuffled)[:, -1], rtol=1e-9, atol=1e-9)
    assert same == (positions == "none")
    assert (net.wpe is None) == (positions != "learned")


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    net = GPT(65, 16, **SMALL, norm="rms").double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for norm in (net.h[0].ln_1, net.h[1].ln_2, net.ln_f):
        torch.nn.init.normal_(norm.weight)
        expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
        assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_feed_forward_formulas() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def made(kind: str, hidden_size: int | None) -> torch.nn.Module:
        return make_feed_forward(kind, n_embd=12, hidden_size=hidden_size, dropout=0.0, bias=True).double()

    def linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.T + layer.bias

    same = {"rtol": 1e-12, "atol": 1e-12}
    mlp = made("swiglu", 20)
    gate = linear(mlp.w_gate, x)
    hidden = gate / (1 + torch.exp(-gate)) * linear(mlp.w_up, x)
    torch.testing.assert_close(mlp(x), linear(mlp.c_proj, hidden), **same)
    formulas = {
        "gelu": lambda z: z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "gelu_erf": lambda z: z / 2 * (1 + torch.erf(z / math.sqrt(2))),
        "relu": lambda z: torch.where(z > 0, z, 0.0),
        "relu_squared": lambda z: torch.where(z > 0, z * z, 0.0),
    }
    for kind, formula in formulas.items():
        mlp = made(kind, 20)
        torch.testing.assert_close(mlp(x), linear(mlp.c_proj, formula(linear(mlp.c_fc, x))), **same)
    mlp = made("single", None)
    torch.testing.assert_close(mlp(x), formulas["relu"](linear(mlp.c_fc, x)), **same)


@pytest.mark.parametrize(
    ("kind", "n_embd", "hidden_size", "width"),
    [
        ("gelu", 32, None, 128),
        ("relu", 32, 40, 40),
        ("swiglu", 128, None, 344),
        ("swiglu", 40, None, 112),
        ("swiglu", 32, 50, 50),
    ],
)
def test_width_of_the_feed_forward(kind: str, n_embd: int, hidden_size: int | None, width: int) -> None:
    net = GPT(65, 16, n_layer=1, n_head=4, n_embd=n_embd, feed_forward=kind, hidden_size=hidden_size)
    assert net.h[0].mlp.c_proj.in_features == width


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_norm_takes_its_eps(norm: str) -> None:
    for settings, expected in (({}, 1e-5), ({"norm_eps": 0.5}, 0.5)):
        net = GPT(65, 16, n_layer=2, n_head=2, n_embd=8, norm=norm, **settings)
        norms = [module for module in net.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm)]
        assert len(norms) == 5 and {one.eps for one in norms} == {expected}


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_queries_are_full_attention_with_repeated_keys_and_values(n_kv_head: int) -> None:
    settings = {"n_embd": 12, "n_head": 4, "dropout": 0.0, "bias": True}
    full = CausalSelfAttention(**settings).double()
    grouped = CausalSelfAttention(**settings, n_kv_head=n_kv_head).double()
    full.c_proj.load_state_dict(grouped.c_proj.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            parameter = getattr(grouped.c_attn, name)
            q, k, v = parameter.split([12, 3 * n_kv_head, 3 * n_kv_head])
            head = [h * n_kv_head // 4 for h in range(4)]  # the key head of each query head
            repeated = [torch.cat([part[3 * h : 3 * h + 3] for h in head]) for part in (k, v)]
            getattr(full.c_attn, name).copy_(torch.cat([q, *repeated]))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-12, atol=1e-12)


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for qk_norm in (True, False):
        rotary = Rotary(head_size=4, block_size=5)
        settings = {"n_embd": 12, "n_head": 3, "dropout": 0.0, "bias": False, "rotary": rotary}
        attention = CausalSelfAttention(**settings, qk_norm=qk_norm).double()
        with torch.no_grad():
            if qk_norm:
                attention.c_attn.weight[:24] *= 1e4  # far above epsilon
            before = attention(x)
            attention.c_attn.weight[:12] *= 2
            attention.c_attn.weight[12:24] *= 1 / 3
            assert torch.allclose(attention(x), before, rtol=1e-6, atol=1e-6) == qk_norm
            if qk_norm:
                q, k, _ = attention.qkv(x)
                for part in (q, k):
                    torch.testing.assert_close(part.square().mean(-1), torch.ones(2, 3, 5).double(), rtol=1e-5, atol=0)
                attention.q_norm.weight *= 3
                assert not torch.allclose(attention(x), before, rtol=1e-3)


def test_soft_cap_bounds_logits() -> None:
    net = GPT(65, 16, **SMALL, tie_weights=False, logit_soft_cap=3.0).double()
    torch.nn.init.normal_(net.lm_head.weight)
    tokens = torch.randint(65, (2, 16))
    capped = net(tokens)
    net.logit_soft_cap = None
    raw = net(tokens)
    assert raw.abs().max().item() > 6 and capped.abs().max().item() < 3
    torch.testing.assert_close(capped, 3 * torch.tanh(raw / 3), rtol=1e-12, atol=1e-12)


def test_blocks_arrange_norm_residual_and_parts_as_told() -> None:
    x = 5 * torch.randn(2, 16, 32, dtype=torch.float64)

    def arranged(**settings: object) -> tuple[torch.nn.Module, torch.Tensor]:
        block = GPT(65, 16, **SMALL, **settings).double().h[1]
        return block, block(x)

    block, y = arranged()
    z = x + block.attn(block.ln_1(x))
    assert torch.equal(y, z + block.mlp(block.ln_2(z)))
    block, y = arranged(norm_position="post")
    z = block.ln_1(x + block.attn(x))
    assert torch.equal(y, block.ln_2(z + block.mlp(z)))
    torch.testing.assert_close(y.var(dim=-1, unbiased=False), torch.ones(2, 16).double(), rtol=1e-4, atol=0)
    block, y = arranged(norm="none")
    z = x + block.attn(x)
    assert torch.equal(y, z + block.mlp(z))
    block, y = arranged(residual=False, norm="none")
    assert torch.equal(y, block.mlp(block.attn(x)))
    block, y = arranged(feed_forward="none", residual=False)
    assert torch.equal(y, block.attn(block.ln_1(x)))


def test_a_final_norm_belongs_to_pre_norm() -> None:
    assert {"ln_f.weight", "ln_f.bias"} <= GPT(65, 16, **SMALL).state_dict().keys()
    for settings in ({"norm_position": "post"}, {"norm": "none"}):
        net = GPT(65, 16, **SMALL, **settings)
        assert not [name for name in net.state_dict() if name.startswith("ln_f")]


def test_which_layers_have_biases() -> None:
    def biased(**settings: object) -> set[str]:
        net = GPT(65, 16, **(SMALL | {"n_layer": 1}), **settings)
        return {name for name, _ in net.named_parameters() if name.endswith("bias") and "ln" not in name}

    rest = {"h.0.attn.c_proj.bias", "h.0.mlp.c_fc.bias", "h.0.mlp.c_proj.bias"}
    assert biased() == rest | {"h.0.attn.c_attn.bias"}
    assert biased(attention_bias=False, head_bias=True) == rest | {"lm_head.bias"}
    assert biased(bias=False, attention_bias=True) == {"h.0.attn.c_attn.bias"}
    assert biased(attention="separate", attention_bias=False) == rest


def test_without_init_std_layers_stay_as_torch_makes_them() -> None:
    net = GPT(1000, 256, n_layer=2, n_head=4, n_embd=64, tie_weights=False, head_bias=True, init_std=None)
    assert float(net.wte.weight.detach().std()) == pytest.approx(1, rel=0.05)
    for layer in (net.lm_head, net.h[1].attn.c_attn, net.h[1].attn.c_proj, net.h[1].mlp.c_proj):
        bound = 1 / math.sqrt(layer.in_features)  # uniform within it
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert layer.bias.any()


def test_init_std_scales_every_residual_projection() -> None:
    net = GPT(65, 16, n_layer=8, n_head=4, n_embd=128, init_std=0.1, **LLAMA)
    assert float(net.h[7].mlp.w_gate.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    for projection in (net.h[7].attn.c_proj, net.h[7].mlp.c_proj):
        assert float(projection.weight.detach().std()) == pytest.approx(0.1 / 4, rel=0.05)


@pytest.mark.filterwarnings("error")
def test_todays_parts_run_in_half_precision() -> None:
    net = GPT(65, 16, **SMALL, **LLAMA, qk_norm=True, n_kv_head=2, logit_soft_cap=30.0)
    tokens = torch.randint(65, (2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(tokens)
    torch.testing.assert_close(logits.float(), net(tokens), rtol=0, atol=0.02)
    assert net.bfloat16()(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("more", [{}, {"norm_position": "post"}, {"token_shift": True}])
def test_a_network_starts_anew_after_a_document(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "positions": "rotary", **more}
    net = GPT(10, 12, **shape, document_end=9).double()
    first, second = torch.tensor([[1, 2, 3, 9]]), torch.tensor([[4, 5, 9, 6, 7]])
    together = net(torch.cat([first, second], dim=1))
    assert torch.allclose(together[:, :4], net(first), rtol=1e-12)
    assert torch.allclose(together[:, 4:7], net(second)[:, :3], rtol=1e-12)  # rotary positions are relative
    assert torch.allclose(together[:, 7:], net(second[:, 3:]), rtol=1e-12)
    assert not torch.allclose(GPT.forward(net, torch.tensor([[4, 5, 8, 6, 7]]))[:, 3:], net(second)[:, 3:])
    maps = net.attention_maps(torch.cat([first, second], dim=1))
    assert (maps[0][:, :, 4:, :4] == 0).all() and (maps[0].sum(-1) - 1).abs().max() < 1e-12


def test_attention_of_separate_heads_has_no_documents() -> None:
    with pytest.raises(ValueError, match="document_end 9 needs attention batched"):
        GPT(10, 8, n_layer=1, n_head=2, n_embd=8, attention="separate", document_end=9)
