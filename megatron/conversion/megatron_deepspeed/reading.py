"""From Megatron's tensors to ours.

Shapes: H hidden, N heads, D head size, F FFN hidden.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, some
from megatron.checkpoint.tensors import dtype_name
from megatron.config import DataConfig, ModelConfig, RunConfig
from megatron.config.run import to_dict
from megatron.conversion.contents import MODEL, Contents, Lazy, is_stacked
from megatron.conversion.megatron_deepspeed.arguments import from_arguments
from megatron.conversion.megatron_deepspeed.core_names import drop_redundant
from megatron.conversion.megatron_deepspeed.layouts import MegatronCheckpoint, Shards, find
from megatron.conversion.megatron_deepspeed.megatron_lm import find_megatron_lm
from megatron.conversion.megatron_deepspeed.names import EXPERTS, TABLE, MegatronTensor, megatron_tensors
from megatron.conversion.native import new_meta
from megatron.data.tokenizer import build_tokenizer


def read_megatron_deepspeed(
    folder: str | os.PathLike, tokenizer_options: Mapping[str, str], tanh_gelu: bool = False
) -> Contents:
    """The weights of a checkpoint of Megatron-DeepSpeed; its optimizer's state is not read.

    Args:
        folder: with ``latest``, or of one tag.
        tokenizer_options: ``tokenizer_type`` and files; they are not in the folder.
        tanh_gelu: whether a model of the exact GELU is taken for one of the tanh form.

    Raises:
        CheckpointError: a file is missing, damaged or holds other objects than tensors; a tensor is missing, unknown or
            of another shape; the model is one that is not known here.
        ValueError: of the tokenizer, or of an argument's value.
    """
    return _contents(find(Path(folder)), "megatron-deepspeed", tokenizer_options, tanh_gelu)


def read_megatron_lm(
    folder: str | os.PathLike, tokenizer_options: Mapping[str, str], tanh_gelu: bool = False
) -> Contents:
    """The weights of a checkpoint of Megatron-LM, as ``mp_rank_XX`` folders or distributed (torch_dist).

    Arguments and errors are those of :func:`read_megatron_deepspeed`, but ``folder`` is one with
    ``latest_checkpointed_iteration.txt`` or of one iteration.
    """
    return _contents(find_megatron_lm(Path(folder)), "megatron-lm", tokenizer_options, tanh_gelu)


def _contents(found: MegatronCheckpoint, name: str, tokenizer_options: Mapping[str, str], tanh_gelu: bool) -> Contents:
    table = found.shards.get(TABLE)
    if not table:
        raise CheckpointError(f"{found.where} has no {TABLE}; it is no GPT of Megatron's")
    vocab_size = sum(shard.shape[0] for shard in table)
    for rank in range(1, len(table)):
        one, other = table[rank - 1], table[rank]
        if (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one.read(None), other.read(None)):
            raise CheckpointError(
                f"{found.where}: tensor-parallel ranks {rank - 1} and {rank} hold the same rows of the token table, so "
                "one file is a copy of the other; copy the files of all ranks from where they were saved"
            )
    residual = any(".mlp.coefficient." in name for name in found.shards)
    config = from_arguments(
        found.args, _expert_counts(found), residual, found.where, core=found.core, tanh_gelu=tanh_gelu
    )
    found = dataclasses.replace(found, shards=drop_redundant(found.shards, found.where))
    if not tokenizer_options:
        raise CheckpointError(
            f"{found.where} holds no tokenizer; give the model's by --tokenizer-type with --vocab-file and "
            "--merge-file, or --tokenizer-model"
        )
    options: dict[str, Any] = dict(tokenizer_options)
    config = dataclasses.replace(config, data=DataConfig(**options))
    tokenizer = build_tokenizer(config.data)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{found.where}: the tokenizer has {tokenizer.vocab_size} ids, the token table {vocab_size} rows; give the "
            "model's own tokenizer by --tokenizer-type and its files"
        )
    described = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    origin = {"format": name, "folder": str(found.where.absolute()), "checkpoint_version": found.version}
    meta = new_meta(to_dict(config), vocab_size, described, config.model.seq_length, origin)
    return Contents(str(found.where), meta, _ours(found, config, vocab_size)).check()


def _expert_counts(found: MegatronCheckpoint) -> dict[int, int]:
    counts: dict[int, int] = {}
    for name in found.shards:
        if EXPERTS in name:
            layer, expert = int(name.split(".")[2]), int(name.split(EXPERTS)[1].split(".")[0])
            counts[layer] = max(counts.get(layer, 0), expert + 1)
    return counts


def _ours(found: MegatronCheckpoint, config: RunConfig, vocab_size: int) -> dict[str, Lazy]:
    """Our tensors, made of theirs, of which each must be used."""
    left, problems = set(found.shards), []
    made: dict[str, list[Lazy]] = {}
    first: dict[str, torch.dtype] = {}
    without_biases, table = getattr(found.args, "add_bias_linear", True) is False, found.shards[TABLE][0]
    for theirs in megatron_tensors(config.model, config.moe, vocab_size):
        left.discard(theirs.name)
        shards = found.shards.get(theirs.name)
        if shards is None and without_biases and theirs.name.endswith(".bias"):
            made.setdefault(theirs.ours, []).append(_zeros(theirs, table.dtype))
        elif shards is None:
            problems.append(f"{theirs.name} is missing")
        elif problem := _misfit(theirs, shards, first.setdefault(theirs.ours, shards[0].dtype)):
            problems.append(problem)
        else:
            made.setdefault(theirs.ours, []).append(_joiner(theirs, shards, found.version, config.model))
    problems += [f"{name} is no tensor of this model" for name in sorted(left) if not name.endswith("_extra_state")]
    if problems:
        raise CheckpointError(f"{found.where} cannot be converted: {some(problems)}. Nothing was written")
    return {MODEL + name: _lazy(parts, name) for name, parts in made.items()}


def _misfit(theirs: MegatronTensor, shards: Shards, first: torch.dtype) -> str | None:
    """What is wrong with the shards of a tensor; ``first`` is the data type that all of ours must have."""
    cut = tuple(size // len(shards) if axis == theirs.dim else size for axis, size in enumerate(theirs.shape))
    fitting = (cut, theirs.shape) if theirs.in_moe else (cut,)
    for shard in shards:
        if tuple(shard.shape) not in fitting or shard.shape != shards[0].shape:
            return f"{theirs.name} has a shard of {list(shard.shape)}, expected {list(cut)}"
        if not shard.dtype.is_floating_point:
            return f"{theirs.name} is {dtype_name(shard.dtype)}, expected floating-point numbers"
        if shard.dtype != first:
            return f"{theirs.name} is {dtype_name(shard.dtype)}, the {_what(theirs)} {dtype_name(first)}"
    return None


def _what(theirs: MegatronTensor) -> str:
    """What the first of the shards belongs to."""
    return "first rank's shard" if theirs.row is None else "first expert of the layer"


def _joiner(theirs: MegatronTensor, shards: Shards, version: float, model: ModelConfig) -> Lazy:
    """The tensor joined of its shards, in our order. Where one is the whole (layer norms, what an MoE layer does not
    cut), the first rank's is taken."""
    dim = None if shards[0].shape == theirs.shape else theirs.dim

    def join() -> torch.Tensor:
        if theirs.is_qkv:
            return _qkv([shard.read(None) for shard in shards], version, model)
        tensor = shards[0].read(None) if dim is None else torch.cat([shard.read(None) for shard in shards], dim)
        return tensor.T if theirs.transposed else tensor

    return _made(theirs, shards[0].dtype, join)


def _zeros(theirs: MegatronTensor, dtype: torch.dtype) -> Lazy:
    """A bias of a model without biases, which computes the same with zeros."""
    return _made(theirs, dtype, lambda: torch.zeros(theirs.shape, dtype=dtype))


def _made(theirs: MegatronTensor, dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> Lazy:
    shape = theirs.shape[::-1] if theirs.transposed else theirs.shape
    return Lazy(shape, dtype, lambda row: make() if row is None else make()[row])


def _qkv(shards: list[torch.Tensor], version: float, model: ModelConfig) -> torch.Tensor:
    """A rank's rows are [3, N, D] in checkpoint version 0, [N, D, 3] in 1.0, [N, 3, D] since 2.0; ours [3, N, D]."""
    N, D = model.num_attention_heads // len(shards), model.hidden_size // model.num_attention_heads
    parts = []
    for shard in shards:
        rest = shard.shape[1:]
        if version >= 2:
            parts.append(shard.view(N, 3, D, *rest).transpose(0, 1))
        elif version >= 1:
            parts.append(shard.view(N, D, 3, *rest).movedim(2, 0))
        else:
            parts.append(shard.view(3, N, D, *rest))
    return torch.cat(parts, dim=1).flatten(0, 2)


def _lazy(parts: list[Lazy], name: str) -> Lazy:
    if not is_stacked(name):
        return parts[0]

    def read(row: int | None) -> torch.Tensor:
        return torch.stack([part.read(None) for part in parts]) if row is None else parts[row].read(None)

    return Lazy((len(parts), *parts[0].shape), parts[0].dtype, read)
