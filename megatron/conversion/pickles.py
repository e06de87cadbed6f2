"""Files of torch and of torch.distributed.checkpoint, read without running anything that they name."""

import argparse
import contextlib
import io
import pickle
import re
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron.checkpoint.errors import CheckpointError


class Unread:
    """Stands for an object of a class that Megatron's checkpoints name, and of which nothing is read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


_reconstruct = numpy.empty(0).__reduce__()[0]
# beyond tensors and plain containers: Megatron's arguments, and states of random generators
ALLOWED = [
    argparse.Namespace,
    types.SimpleNamespace,
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype(numpy.uint32)),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # its name before and since numpy 2
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]
_PATHS = ("pathlib.PosixPath", "pathlib._local.PosixPath")
# what Megatron-LM's arguments, schedulers and optimizers hold, in any of its versions
_UNREAD = [
    "_io.BytesIO",
    "fp16.loss_scaler.DynamicLossScaler",
    "fp16.loss_scaler.LossScaler",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.enums.ModelType",
    "megatron.fp16.loss_scaler.DynamicLossScaler",
    "megatron.fp16.loss_scaler.LossScaler",
    "megatron.model.enums.ModelType",
    *_PATHS,
    "signal.Signals",
    "torch._C.Generator",
]
# of .metadata, beyond data types
_METADATA = {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        f"torch.distributed.checkpoint.planner.{name}"
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}  # fmt: skip


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file, by torch's restricted unpickler and :data:`ALLOWED`; tensors stay on the disk.

    Objects of other classes of Megatron's are :class:`Unread`.

    Raises:
        CheckpointError: the file is damaged, names anything else, which the message names, or holds no dictionary.
    """
    with nothing_run(path):
        unread = [(Unread, name) for name in _UNREAD]
        with torch.serialization.safe_globals([*ALLOWED, *unread]):
            # torch before 1.6 wrote files of another kind, which come into memory as a whole
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a dictionary")
    return content


def load_tensor(path: Path, offset: int, length: int) -> torch.Tensor:
    """The tensor that torch.save wrote as ``length`` bytes at ``offset`` of a file, by torch's restricted unpickler.

    Raises:
        CheckpointError: there is none.
    """
    with nothing_run(path), open(path, "rb") as file:
        file.seek(offset)
        tensor = torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path} holds {type(tensor).__name__} at {offset}; expected a tensor")
    return tensor.detach()


def load_metadata(path: Path) -> Metadata:
    """``.metadata`` of torch.distributed.checkpoint, a pickle, by an unpickler that knows its own dataclasses only.

    torch's own FileSystemReader unpickles it without such a limit.

    Raises:
        CheckpointError: it is damaged or names anything else, which the message names.
    """
    with nothing_run(path), open(path, "rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds {type(metadata).__name__}; expected what torch's checkpoints hold there")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _PATHS:
            return Unread
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and f"{module}.{name}" not in _METADATA:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


@contextlib.contextmanager
def nothing_run(path: Path) -> Iterator[None]:
    """Around what unpickles ``path`` under a restriction: its errors are CheckpointErrors that say what was found."""
    try:
        yield
    except Exception as error:  # unpickling raises whatever it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {forbidden[1]}, which is not allowed" if forbidden else lines[0]
        raise CheckpointError(
            f"{path} is damaged or holds something else than tensors and arguments: {why}. Nothing of it was run. "
            "Copy the file again"
        ) from None
