"""Checkpoints in a layout that knows no parallelism: saved by any number of ranks, loaded by any other number.

A checkpoint is a list of named global tensors (:class:`ShardedTensor`), of which each rank holds some boxes, and a
JSON-able ``meta``. It is written atomically, verified before loading, and contains no pickled code.

    save(folder, step, entries, meta, group)     write and mark latest
    AsyncSaver(group).save(...)                  the same in the background
    latest(folder)                               the checkpoint to go on from
    load(folder, entries, group) -> meta         fill the boxes of this rank, whatever layout it was saved in
    read_meta(folder)                            the metadata alone

The files: :mod:`megatron.checkpoint.folder`; how boxes get into them and out: :mod:`megatron.checkpoint.storage`.
"""

from megatron.checkpoint.errors import CheckpointError, CommunicationError
from megatron.checkpoint.folder import CheckpointStatus, latest
from megatron.checkpoint.loading import load, read_meta
from megatron.checkpoint.saving import AsyncSaver, save
from megatron.checkpoint.tensors import Box, Deferred, ShardedTensor, data_of, flat_boxes

__all__ = [
    "AsyncSaver",
    "Box",
    "CheckpointError",
    "CheckpointStatus",
    "CommunicationError",
    "Deferred",
    "ShardedTensor",
    "data_of",
    "flat_boxes",
    "latest",
    "load",
    "read_meta",
    "save",
]
