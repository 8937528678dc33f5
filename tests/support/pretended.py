"""A device that this machine does not have: its tensors compute on the CPU, but never together with a CPU's.

What a GPU would refuse is refused here, so that a tensor made without `device=` is found without a GPU. It is stricter:
indices must be on the device, too. As on a GPU, a single number may come from the CPU.

It is PyTorch's "privateuseone" device, which a process cannot give up again: call `register` in a process of its own.
"""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
OPTIONS = ("--trainer.accelerator", NAME, "--trainer.strategy", NAME)
"""For `lm fit`."""
COPIES = ("copy_", "_copy_from", "_copy_from_and_resize")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
waited: list[str] = []
"""The operations so far for whose results a program would wait."""
_libraries: list[torch.library.Library] = []  # what they register lasts as long as they do


class Pretended(Tensor):
    """A tensor of the device; `raw` has its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Pretended":
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
        )
        made.raw = raw
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.raw})"

    def tolist(self) -> Any:
        """Return the numbers, which torch does for its own devices alone."""
        return self.raw.tolist()

    def data_ptr(self) -> int:
        """Return where the numbers are."""
        return self.raw.data_ptr()

    def __deepcopy__(self, memo: Any) -> "Pretended":
        memo[id(self)] = made = Pretended(self.raw.clone()).requires_grad_(self.requires_grad)
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, *args, **(kwargs or {}))


@torch.inference_mode(
    False
)  # a view of an ordinary tensor is one, even there: torch sees to it for its own devices alone
def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device on the CPU.

    Raises:
        RuntimeError: A tensor is not on the device.
    """
    given, spec = pytree.tree_flatten((args, kwargs))
    name = op._schema.name.removeprefix("aten::")
    elsewhere = [one for one in given if isinstance(one, Tensor) and not isinstance(one, Pretended) and one.ndim]
    if elsewhere and name not in COPIES:
        raise RuntimeError(f"{name}: expected all tensors on {NAME}, found one on {elsewhere[0].device}")
    here = [one for one in given if isinstance(one, Pretended)]
    leaves = "device" in kwargs and torch.device(kwargs["device"] or NAME).type != NAME
    by_mask = name == "index" and any(one.dtype == torch.bool for one in here)
    if leaves or by_mask or name in WAITS:
        waited.append(name)
    raw = [torch.device("cpu") if isinstance(one, torch.device) else getattr(one, "raw", one) for one in given]
    raw_args, raw_kwargs = pytree.tree_unflatten(raw, spec)
    result = op(*raw_args, **raw_kwargs)
    if leaves:
        return result
    same = {id(one.raw): one for one in here}  # what was changed in place stays the tensor it was
    return pytree.tree_map_only(Tensor, lambda one: same[id(one)] if id(one) in same else Pretended(one), result)


class Module(_DummyBackendModule):
    """What torch calls for the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the types that autocast may choose."""
        return [torch.bfloat16]


class Accelerator(CPUAccelerator):
    """What Lightning calls for the device."""

    def setup_device(self, device: torch.device) -> None:
        """Do nothing."""


class Alone(SingleDeviceStrategy):
    """One process on the device."""

    def __init__(self) -> None:
        super().__init__(device=torch.device(NAME, 0))

    def teardown(self) -> None:
        """Leave the module where it is: torch refuses to swap tensors to which the process has other references."""


def register() -> torch.device:
    """Make the device known to this process, for good; return it."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")  # what has no tensor to begin with: zeros, arange, …
    aten = torch.library.Library("aten", "IMPL")
    ops: Any = torch.ops.aten
    # torch.tensor copies where no fallback is found; arange resizes its result
    for op in (ops.copy_.default, ops.arange.default, ops.arange.start, ops.arange.start_step):
        aten.impl(op, partial(compute, op), "PrivateUse1")
    _libraries.extend([library, aten])
    AcceleratorRegistry.register(NAME, Accelerator, "")
    StrategyRegistry.register(NAME, Alone)
    torch.__future__.set_swap_module_params_on_conversion(True)  # or tied parameters would be two after a move
    return torch.device(NAME, 0)
