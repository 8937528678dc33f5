"""Networks with smaller numbers, for generation: less memory is read for each token, which is what takes the time.

Shapes: B rows, K inputs, N outputs of a linear layer; the kernel takes multiples of 32 of both.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.errors import UserError, setting
from lm.models.rotary import Rotary

Dtype = Literal["float32", "bfloat16", "int8"]
MULTIPLE = 32


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers, with a scale for each output; activations are bfloat16.

    A weight w of output n becomes round(w / s_n), where s_n = max |w| / 127 over the output's weights: an error of at
    most s_n / 2.

    Args:
        linear: The layer; K is a multiple of 32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()  # (N, K)
        weight = F.pad(weight, (0, 0, 0, -len(weight) % MULTIPLE))
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (N,)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])  # (B, K)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)  # (B, K) @ (K, N) -> (B, N)
        y = y[:, : self.out_features].unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def narrowed(net: nn.Module, dtype: Dtype) -> nn.Module:
    """Return a network whose weights are of a type, in the given one's place; it is for generation alone.

    With int8, linear layers hold integers where the kernel takes their sizes; all else is bfloat16. Rotary angles
    stay in 32 bits: a position of some hundreds has no place in bfloat16's eight.

    Raises:
        UserError: int8 on a device other than a CPU.
    """
    if dtype == "float32":
        return net
    if dtype == "int8" and next(net.parameters()).device.type != "cpu":
        raise UserError(f"{setting('dtype')} int8 is for CPUs: say bfloat16")
    angles = [(module, module.cos, module.sin) for module in net.modules() if isinstance(module, Rotary)]
    if dtype == "int8":
        for parent in list(net.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0:
                    setattr(parent, name, Int8Linear(layer))
    net = net.to(torch.bfloat16)  # integers stay
    for module, cos, sin in angles:
        module.cos, module.sin = cos, sin
    return net


def has_instructions() -> bool:
    """Return whether this CPU multiplies bfloat16: without, smaller numbers take longer than float32."""
    kernels: Any = torch.ops.mkldnn
    return bool(kernels._is_mkldnn_bf16_supported())
