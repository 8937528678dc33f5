"""The tensors of a sharded checkpoint, read without running code.

torch's own library for them, torch.distributed.checkpoint, takes nearly half a second to import: only what reads a
sharded checkpoint imports this file.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_METADATA = (
    "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)  # fmt: skip
INDEX = {("torch.distributed.checkpoint.metadata", name) for name in _METADATA} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}
"""What torch pickles in the index of a checkpoint."""


class Reader(dcp.FileSystemReader):
    """torch's reader, but it unpickles the index with only the classes that an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        with (Path(self.path) / ".metadata").open("rb") as stream:
            index = _Index(stream).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"the index of a checkpoint is no {type(index).__name__}")
        index.storage_meta = getattr(index, "storage_meta", None) or dcp.metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name != "Size" and not isinstance(getattr(torch, name, None), torch.dtype):
            raise pickle.UnpicklingError(f"the index of a checkpoint has no {module}.{name}")
        if module != "torch" and (module, name) not in INDEX:
            raise pickle.UnpicklingError(f"the index of a checkpoint has no {module}.{name}")
        return super().find_class(module, name)


def shapes(reader: dcp.FileSystemReader) -> dict[str, Tensor]:
    """Return the network's state without values, as tensors on the meta device."""
    found = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        if key.startswith("state_dict.") and isinstance(stored, TensorStorageMetadata):
            dtype = stored.properties.dtype
            found[key.removeprefix("state_dict.")] = torch.empty(stored.size, dtype=dtype, device="meta")
    return found


def load(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a sharded checkpoint by their names in it.

    Raises:
        ValueError: They are not what the index says.
    """
    flat: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in Reader(path).read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")  # it is
        try:
            dcp.load(flat, storage_reader=Reader(path), no_dist=True)
        except dcp.api.CheckpointException as error:
            raise ValueError(str(next((one for one, _ in error.failures.values()), error))) from error
    return flat
