"""megatron.core's names, put into the spelling of :mod:`megatron.conversion.megatron_deepspeed.names`.

Shapes: E experts (of one file), H hidden, F FFN hidden (of one rank).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.conversion.contents import Lazy
from megatron.conversion.megatron_deepspeed.layouts import Shards, row_of
from megatron.conversion.megatron_deepspeed.names import EXPERTS, TABLE

HEAD = "word_embeddings_for_head.weight"  # the last stage's copy of the token table
_ROUTER_BIAS = ".mlp.deepspeed_moe.gate.wg.bias"
_OUTSIDE = {"output_layer.": "word_embeddings_for_head.", "decoder.final_layernorm.": "encoder.final_layernorm."}
_IN_LAYER = {  # a layer norm is a module of its own, or fused with the matrix that reads it
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
    "mlp.router.": "mlp.deepspeed_moe.gate.wg.",
}
_MATRIX = {"1": "dense_h_to_4h", "2": "dense_4h_to_h"}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_ONE_EXPERT = re.compile(r"(?:local_)?experts\.(\d+)\.linear_fc([12])\.(weight|bias)")  # SequentialMLP
_NUMBERED = re.compile(r"linear_fc([12])\.(weight|bias)(\d+)")  # TEGroupedMLP
_STACKED = re.compile(r"experts\.linear_fc([12])\.(weight|bias)")  # either, in a distributed checkpoint
_SIDE_BY_SIDE = re.compile(r"weight([12])")  # GroupedMLP: [H, E * F] and [E * F, H]


def from_core(
    name: str, lazy: Lazy, *, first_layer: int = 0, first_expert: int = 0, experts: int = 1
) -> Iterator[tuple[str, Lazy]]:
    """A tensor, or each expert's part of it, under the other spelling; a name that is not known stays as it is.

    Args:
        name: within the model or its pipeline stage.
        lazy: the tensor.
        first_layer: the number of the stage's first layer.
        first_expert: the number of the rank's first expert.
        experts: of the rank.
    """
    if not (match := _LAYER.fullmatch(name)):
        yield _renamed(name, _OUTSIDE), lazy
        return
    before, inside = f"encoder.layers.{int(match[1]) + first_layer}", match[2]
    if inside.startswith("mlp.experts."):
        for expert, rest, part in _of_experts(inside.removeprefix("mlp.experts."), lazy, experts):
            yield f"{before}{EXPERTS}{first_expert + expert}.{rest}", part
    else:
        yield f"{before}.{_renamed(inside, _IN_LAYER)}", lazy


def _renamed(name: str, table: dict[str, str]) -> str:
    for theirs, other in table.items():
        if name.startswith(theirs):
            return other + name.removeprefix(theirs)
    return name


def _of_experts(name: str, lazy: Lazy, experts: int) -> Iterator[tuple[int, str, Lazy]]:
    """Each expert's number within the file, name within the expert, and tensor."""
    if match := _ONE_EXPERT.fullmatch(name):
        yield int(match[1]), f"{_MATRIX[match[2]]}.{match[3]}", lazy
    elif match := _NUMBERED.fullmatch(name):
        yield int(match[3]), f"{_MATRIX[match[1]]}.{match[2]}", lazy
    elif match := _STACKED.fullmatch(name):
        for expert in range(lazy.shape[0]):
            yield expert, f"{_MATRIX[match[1]]}.{match[2]}", row_of(lazy, expert)
    elif match := _SIDE_BY_SIDE.fullmatch(name):
        for expert in range(experts):
            yield expert, f"{_MATRIX[match[1]]}.weight", _side_by_side(lazy, match[1] == "1", expert, experts)
    else:
        yield 0, name, lazy


def _side_by_side(lazy: Lazy, first: bool, expert: int, experts: int) -> Lazy:
    """An expert's matrix, output-first. Although the first is [H, E * F] by its shape, its memory is [E, H, F]."""
    H = lazy.shape[0 if first else 1]
    F = lazy.shape[1 if first else 0] // experts
    inputs, outputs = (H, F) if first else (F, H)

    def read(row: int | None) -> torch.Tensor:
        matrix = lazy.read(None).view(experts, inputs, outputs)[expert].T
        return matrix if row is None else matrix[row]

    return Lazy((outputs, inputs), lazy.dtype, read)


def drop_redundant(shards: dict[str, Shards], where: Path) -> dict[str, Shards]:
    """Without what a model here does not have, where it changes nothing: a head's copy of the token table, and a
    router's bias that is the same for all experts.

    Raises:
        CheckpointError: it changes something.
    """
    for name in [name for name in shards if name == HEAD or name.endswith(_ROUTER_BIAS)]:
        given = [shard.read(None) for shard in shards[name]]
        if name == HEAD:
            table = [shard.read(None) for shard in shards.get(TABLE, [])]
            if len(given) != len(table) or not all(map(torch.equal, given, table)):
                raise CheckpointError(f"{where}: the output layer is not tied to the token table, which is needed here")
        elif given[0].min() != given[0].max():
            raise CheckpointError(f"{where}: {name} differs between experts; routers here have no bias")
    return {name: of for name, of in shards.items() if name != HEAD and not name.endswith(_ROUTER_BIAS)}
