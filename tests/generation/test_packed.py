"""Networks with smaller numbers compute what they should, up to their rounding."""

import pytest
import torch
from torch import nn

from lm.errors import UserError
from lm.generation import Sampler, generate
from lm.generation.engine import Engine, Request
from lm.generation.packed import Int8Linear, PackedLinear, packed
from lm.models import GPT, GRU, MLP, GatedWaveNet, Seq2Seq, WaveNet
from lm.tokenizers import ByteTokenizer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (64, 65), (96, 7), (384, 100)])
@torch.inference_mode()
def test_a_linear_layer_of_integers(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).double()
    layer, x = Int8Linear(linear), torch.randn(2, 3, inputs, dtype=torch.float64)
    made = layer.weight[:outputs].double() * layer.scale[:outputs, None].double()
    # half a unit, and what rounding the scale to eight bits moves a weight of 127 of them
    assert float(((made - linear.weight).abs() / layer.scale[:outputs, None]).max()) <= 0.5 + 127 / 256
    expected = nn.functional.linear(x.bfloat16().double(), made, linear.bias)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_layer_is_the_layer(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 65, bias=bias).to(dtype)
    layer, x = PackedLinear(linear), torch.randn(7, 2, 96, dtype=dtype)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    error = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x).double(), exact, rtol=4 * error, atol=4 * error)
    one = layer(x[:1, :1])  # a single row
    assert one.shape == (1, 1, 65) and torch.equal(one, layer(x)[:1, :1])


NETS = {
    "gpt": lambda: GPT(256, 64, n_layer=2, n_head=4, n_embd=64, positions="rotary", feed_forward="swiglu", norm="rms"),
    "shift": lambda: GPT(256, 64, n_layer=2, n_head=4, n_embd=64, feed_forward="relu_squared", token_shift=True),
    "separate": lambda: GPT(256, 64, n_layer=1, n_head=2, n_embd=32, attention="separate"),
    "seq2seq": lambda: Seq2Seq(256, 64, n_embd=64, start_token=62),
    "mlp": lambda: MLP(256, 8),
    "wavenet": lambda: WaveNet(256, 8),
    "dense": lambda: WaveNet(256, 8, n_embd=32, n_hidden=64, dense=True),
    "gated": lambda: GatedWaveNet(256, 64, n_embd=32),
    "gru": lambda: GRU(256, 64),
}


@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_packing_changes_the_last_bits_at_most(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    tokens = torch.randint(256, (4, 8))
    tokens[:, 2] = 62
    exact = net(tokens)
    torch.testing.assert_close(packed(net)(tokens), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_losses_are_close(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    tokens = torch.randint(256, (4, 8))
    tokens[:, 2] = 62
    exact = net(tokens).log_softmax(-1)
    rounded = packed(net, dtype)(tokens)  # type: ignore[arg-type]
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float().log_softmax(-1) - exact).abs().max()) < 0.1
    assert not torch.equal(rounded.float().log_softmax(-1), exact)
    next(generate(net, tokens, sampler=Sampler(), generator=torch.Generator()))


@torch.inference_mode()
def test_far_positions_keep_their_angles() -> None:
    net = GPT(16, 2048, n_layer=1, n_head=1, n_embd=32, positions="rotary").eval()
    before = net.h[0].attn.rotary.cos.clone()  # type: ignore[union-attr]
    assert torch.equal(packed(net, "bfloat16").h[0].attn.rotary.cos, before)  # type: ignore[union-attr,index]


def test_the_engine_takes_them() -> None:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    for dtype in ("bfloat16", "int8"):
        net = packed(NETS["gpt"]().eval(), dtype)  # type: ignore[arg-type]
        requests = [Request(prompt=[65 + i], seed=i, max_new_tokens=20, logprobs=1) for i in range(9)]
        together = Engine(net, tokenizer, slots=4).run(requests)
        alone = [Engine(net, tokenizer, slots=4).run([request])[0] for request in requests]
        assert [text.logprobs for text in together] == [text.logprobs for text in alone]


def test_what_is_packed_and_what_stays() -> None:
    net = NETS["gpt"]()
    head = packed(net).lm_head  # type: ignore[union-attr]
    assert isinstance(head, PackedLinear) and isinstance(net.wte.weight, nn.Parameter)
    exact = packed(NETS["gpt"]().double())  # oneDNN has no float64
    assert type(exact.lm_head) is nn.Linear


def test_integers_are_for_cpus() -> None:
    with torch.device("meta"):
        net = GPT(16, 8, n_layer=1, n_head=1, n_embd=32)
    with pytest.raises(UserError, match="`dtype` int8 is for CPUs"):
        packed(net, "int8")
