"""From our tensors to files that Megatron-DeepSpeed loads, for any number of tensor-parallel ranks.

Megatron's own nesting is kept (``language_model`` > ``embedding``, ``encoder``), without which it does not load them.
Every rank gets each expert's file, so any expert-parallel degree finds what it needs.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.config import RunConfig
from megatron.conversion.contents import MODEL, Contents
from megatron.conversion.megatron_deepspeed.arguments import to_arguments
from megatron.conversion.megatron_deepspeed.names import MegatronTensor, megatron_tensors
from megatron.conversion.output import staged

VERSION = 3.0  # of the checkpoint: the rows of Q, K and V are [N, 3, D]


def write_megatron_deepspeed(contents: Contents, folder: str | os.PathLike) -> Path:
    """Write a model as Megatron-DeepSpeed saves it without a pipeline, cut for the tensor-parallel ranks that the
    configuration records.

    Memory holds one tensor at a time: a rank's file is put together on the disk, which needs room for it twice.

    Args:
        contents: the model; an optimizer's state must have been dropped.
        folder: where to.

    Returns:
        The folder of the tag.

    Raises:
        CheckpointError: the folder is taken, the disk is too small, tensors have several data types, Megatron-DeepSpeed
            does not have such a model, or reading failed; nothing is left behind.
    """
    contents.check()
    if contents.has_optimizer:
        raise CheckpointError(f"{contents.where}: the optimizer's state is not written here; add --drop-optimizer")
    if contents.config.model.qk_layernorm:
        raise CheckpointError(
            f"{contents.where} is a model with --qk-layernorm, which Megatron-DeepSpeed does not have; use --to hf"
        )
    if contents.config.moe.enabled and contents.config.moe.has_expert_bias:
        raise CheckpointError(
            f"{contents.where} chooses experts with a bias for each ({contents.config.moe.balancing}), which "
            "Megatron-DeepSpeed does not have; use --to hf"
        )
    if contents.config.moe.enabled and contents.config.moe.moe_router_center_input:
        raise CheckpointError(
            f"{contents.where} is a model with --moe-router-center-input, which Megatron-DeepSpeed does not have; use "
            "--to hf"
        )
    config, vocab_size, dtype = contents.config, contents.meta["vocab_size"], contents.dtype
    cuts = Cuts(config)
    clock = contents.meta["clock"]
    beside = {
        "args": to_arguments(config, vocab_size, cuts.ranks, cuts.experts, dtype, clock),
        "checkpoint_version": VERSION,
        "iteration": contents.step,
        "tokens": clock["samples"] * clock["seq_length"],
        "num_experts": [config.moe.experts_of_layer(layer) for layer in _moe_layers(config)],
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": contents.step,
        "global_samples": clock["samples"],
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": cuts.ranks,
    }
    tensors = list(megatron_tensors(config.model, config.moe, vocab_size))
    outside = [theirs for theirs in tensors if theirs.row is None]
    sizes = [math.prod(cuts.shape(theirs)) * dtype.itemsize * (cuts.ranks + (theirs.row is None)) for theirs in tensors]
    tag = f"global_step{contents.step}"
    with staged(folder, sum(sizes)) as temporary:
        (temporary / tag).mkdir()
        for rank in range(cuts.ranks):
            shards = {
                theirs.name: _on_disk(temporary / "scratch", cuts.shard(theirs, contents, rank)) for theirs in outside
            }
            path = temporary / tag / f"mp_rank_{rank:02d}_model_states.pt"
            torch.save({"module": {"language_model": _nested(shards)}, **beside}, path)
            del shards  # and their room on the disk
        _write_experts(temporary / tag, [theirs for theirs in tensors if theirs.row is not None], contents, cuts)
        (temporary / "latest").write_text(tag)
        (temporary / "latest_checkpointed_iteration.txt").write_text(str(contents.step))
    return Path(folder) / tag


class Cuts:
    """How a model's tensors are shared by tensor-parallel ranks."""

    def __init__(self, config: RunConfig) -> None:
        self.ranks = config.parallel.tensor_model_parallel_size
        self.experts = config.parallel.enable_expert_tensor_parallelism and self.ranks > 1
        self.heads = config.model.num_attention_heads

    def shape(self, theirs: MegatronTensor) -> tuple[int, ...]:
        """Of a rank's shard."""
        dim = self._dim(theirs)
        return tuple(size // self.ranks if axis == dim else size for axis, size in enumerate(theirs.shape))

    def shard(self, theirs: MegatronTensor, contents: Contents, rank: int) -> torch.Tensor:
        """What one rank has of a tensor."""
        tensor = contents.tensors[MODEL + theirs.ours].read(theirs.row)
        if theirs.transposed:
            tensor = tensor.T
        if theirs.is_qkv:  # [3, N, D] -> [N, 3, D]
            tensor = tensor.view(3, self.heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(theirs.shape)
        dim = self._dim(theirs)
        return tensor if dim is None else tensor.chunk(self.ranks, dim)[rank]

    def _dim(self, theirs: MegatronTensor) -> int | None:
        return None if theirs.in_moe and not self.experts else theirs.dim


def _moe_layers(config: RunConfig) -> list[int]:
    return [layer for layer in range(config.model.num_layers) if config.moe.experts_of_layer(layer) > 1]


def _nested(shards: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Megatron's nesting: ``embedding.x.weight`` is ``{embedding: {x: {weight}}}``, the encoder is flat."""
    module: dict[str, Any] = {}
    for name, tensor in shards.items():
        first, rest = name.split(".", 1)
        inner = module.setdefault(first, {})
        if first == "embedding":
            table, rest = rest.split(".", 1)
            inner = inner.setdefault(table, {})
        inner[rest] = tensor
    return module


def _on_disk(scratch: Path, tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose memory is a file without a name, gone with the tensor.

    Raises:
        OSError: the file cannot have that size.
    """
    try:
        copy = torch.from_file(str(scratch), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    except RuntimeError as error:
        raise OSError(str(error)) from None
    scratch.unlink()
    return copy.copy_(tensor)


def _write_experts(tag: Path, tensors: list[MegatronTensor], contents: Contents, cuts: Cuts) -> None:
    layers = {layer: number for number, layer in enumerate(_moe_layers(contents.config))}
    for (layer, expert), parts in _by_expert(tensors).items():
        for rank in range(cuts.ranks):
            state = {f"language_model.{theirs.name}": cuts.shard(theirs, contents, rank).clone() for theirs in parts}
            torch.save(state, tag / f"layer_{layers[layer]}_expert_{expert}_mp_rank_{rank:02d}_model_states.pt")


def _by_expert(tensors: list[MegatronTensor]) -> dict[tuple[int, int | None], list[MegatronTensor]]:
    experts: dict[tuple[int, int | None], list[MegatronTensor]] = {}
    for theirs in tensors:
        experts.setdefault((int(theirs.name.split(".")[2]), theirs.row), []).append(theirs)
    return experts
