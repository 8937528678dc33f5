"""Networks that do not fit on one device: each rank keeps a shard of every parameter, by FSDP2.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020). A sharded checkpoint
is a folder: the tensors as torch.distributed.checkpoint writes them, each rank its shards; lm.pt, with all else that a
checkpoint has; checksums.json.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lm.checkpoints import checkpoint as files
from lm.checkpoints import sharded, sharded_tensors
from lm.errors import UserError
from lm.models.layers import BatchNorm
from lm.training import lightning_internals
from lm.training.compute import blocks
from lm.training.lightning_internals import SubprocessLauncher


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Leave each rank its shard of every parameter; a block's parameters are gathered when it runs, and freed after.

    Raises:
        UserError: It has BatchNorm, whose running statistics nothing would keep the same on all ranks.
    """
    if any(isinstance(module, BatchNorm) for module in net.modules()):
        raise UserError(f"trainer.strategy fsdp2: {type(net).__name__} has BatchNorm, which is not sharded: use ddp")
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def is_sharded(trainer: Trainer) -> bool:
    """Return whether the parameters are sharded over the ranks, so that all must compute when one does."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


class Sharded(ModelParallelStrategy):
    """`trainer.strategy fsdp2`: shards the network, and writes and reads checkpoints of either kind.

    Lightning's own writes straight into the target folder, so that a crash leaves it incomplete, has no checksums, and
    unpickles what it finds. Works on CPUs as on GPUs; FSDPStrategy, the first FSDP, refuses CPUs and clipping.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1)
        self._group: distributed.ProcessGroup | None = None  # in which the ranks' writers communicate

    def _configure_launcher(self) -> None:
        # in every process, as DDP's, so that each joins the rendezvous; Lightning's is in the first process alone
        assert self.cluster_environment is not None
        self._launcher = SubprocessLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Shard over all ranks, on one node or several."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer state by parameter name: this rank's shards."""
        inner = lightning_internals.inner(optimizer)
        assert self.model is not None
        return dict(get_optimizer_state_dict(self.model, inner))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Copy this rank's shards, and write them in the background: a folder, whole or not at all.

        Raises:
            UserError: The one before could not be written; for this one, `writer.check` and `writer.wait` raise it.
        """
        io: Any = self.checkpoint_io
        io.writer.wait()  # it may still be copying the last checkpoint to this path, and its buffers are reused
        if self._group is None:
            pinned = self.root_device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False)
            )
            self._group = distributed.new_group(backend="gloo")  # the default one is for training alone
        path = Path(self.broadcast(filepath))
        if self.global_rank == 0:
            io.see(path.parent)
        (optimizer,) = checkpoint.pop("optimizer_states")
        tensors = {"state_dict": checkpoint.pop("state_dict"), "optimizer": optimizer["state"]}
        checkpoint["param_groups"] = optimizer["param_groups"]
        shares: Any = self._stager.stage(tensors)
        io.writer.submit(partial(_write, shares, io.writer.snapshot(checkpoint), path, self._group))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder, written by any number of ranks, or a single file; return all but the tensors' values.

        Raises:
            UserError: It is missing, damaged, or of another network.
        """
        path = Path(self.broadcast(checkpoint_path))
        io: Any = self.checkpoint_io
        io.restoring = path
        module: Any = self.lightning_module
        assert self.model is not None
        (optimizer,) = self.optimizers or (None,)
        if not path.is_dir():
            saved = files.load(path)
            module.check(saved)
            whole = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.model, saved["state_dict"], options=whole)
            if optimizer is not None:
                state = by_name(saved["optimizer_states"][0], optimizer, self.model)
                set_optimizer_state_dict(self.model, optimizer, state, options=whole)
            return saved
        if self.global_rank == 0:
            files.verify(path)
        self.barrier("verified")
        saved = sharded.meta(path)
        reader = sharded_tensors.Reader(path)
        saved["state_dict"] = sharded_tensors.shapes(reader)
        module.check(saved)
        tensors: dict[str, Any] = {"state_dict": self.model.state_dict()}
        state = get_optimizer_state_dict(self.model, optimizer) if optimizer is not None else {}
        if optimizer is not None:
            tensors["optimizer"] = state["state"]
        with files.of_lm(path):
            dcp.load(tensors, storage_reader=reader)
        set_model_state_dict(self.model, tensors["state_dict"])
        if optimizer is not None:
            set_optimizer_state_dict(self.model, optimizer, state)
        return saved


def _write(tensors: dict[str, Any], rest: dict[str, Any], path: Path, group: distributed.ProcessGroup) -> None:
    with sharded.replacing(path, group) as part:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part, sync_files=True), process_group=group)
        if distributed.get_rank() == 0:
            files.write(rest, part / sharded.META)


def by_name(state: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state_dict with parameters' names in place of their numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    named = dict(zip(numbers, (name for group in groups for name in group), strict=True))
    return {
        "state": {named[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": params} for group, params in zip(state["param_groups"], groups, strict=True)
        ],
    }
