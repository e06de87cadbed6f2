"""Which files a checkpoint of Megatron-DeepSpeed has, and the pieces of tensors in them.

FOLDER/latest                                               the newest tag
FOLDER/TAG/mp_rank_XX_model_states.pt                       all but the experts, of tensor-parallel rank XX
FOLDER/TAG/layer_L_expert_E_mp_rank_XX_model_states.pt      expert E of MoE layer number L
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.contents import some
from megatron.checkpoint.formats.megatron_deepspeed.names import EXPERTS
from megatron.checkpoint.formats.megatron_deepspeed.pickles import load_pickle

Pieces = list[torch.Tensor]  # of one tensor, by tensor-parallel rank
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")


@dataclasses.dataclass(frozen=True)
class Found:
    """What the files of one checkpoint hold, under one spelling of the names: those within Megatron's
    ``language_model``, layers counted over all of the model."""

    where: Path
    args: Any
    version: float  # checkpoint_version: the order of rows in the projection to Q, K and V
    pieces: dict[str, Pieces]


def has_files(folder: Path) -> bool:
    """Whether a folder, or one in it, has such files."""
    return folder.is_dir() and any(_files(each) for each in (folder, *(p for p in folder.iterdir() if p.is_dir())))


def find(folder: Path) -> Found:
    """The tensors of ``folder``, with ``latest`` or of one tag; they stay on the disk until they are read.

    Raises:
        CheckpointError: a file is missing, damaged or holds other objects than tensors.
    """
    tag = _tag(folder)
    ranks = [load_pickle(tag / name) for name in _files(tag)]
    return Found(tag, ranks[0].get("args"), float(ranks[0].get("checkpoint_version") or 0), _gather(tag, ranks))


def _files(tag: Path) -> list[str]:
    return sorted(path.name for path in tag.iterdir() if _RANK.fullmatch(path.name))


def _tag(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; give the folder that holds mp_rank_00_model_states.pt")
    tag = folder
    if (folder / "latest").is_file():
        name = (folder / "latest").read_text().strip()
        if Path(name).name != name or not (folder / name).is_dir():
            raise CheckpointError(f"{folder / 'latest'} names {name!r}, which is no folder in {folder}; restore it")
        tag = folder / name
    names = _files(tag)
    if any(tag.glob("layer_*-model_*-model_states.pt")):
        raise CheckpointError(f"{tag} was saved by a pipeline, which is not read here; save it with one stage")
    if not names:
        raise CheckpointError(
            f"{tag} holds no mp_rank_XX_model_states.pt; give the folder of Megatron-DeepSpeed's --save"
        )
    numbers = [int(_RANK.fullmatch(name)[1]) for name in names]
    if missing := sorted(set(range(max(numbers) + 1)) - set(numbers)):
        raise CheckpointError(f"{tag} lacks mp_rank_{missing[0]:02d}_model_states.pt; copy it from where it was saved")
    return tag


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + name, value


def _named(name: str) -> str:
    """One spelling of the names that different versions use."""
    name = re.sub(r"^(module\.|moe_state_dict\.)*(language_model\.)?", "", name)
    name = re.sub(r"^transformer\.", "encoder.", name)
    return name.replace(".attention.", ".self_attention.")


def _gather(tag: Path, ranks: list[dict[str, Any]]) -> dict[str, Pieces]:
    """Every tensor's pieces by tensor-parallel rank, experts included, under one spelling of the names."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, content in enumerate(ranks):
        for name, tensor in _flat(content.get("module") or content.get("model") or {}):
            if not _named(name).startswith("word_embeddings_for_head"):  # the token table again
                found.setdefault(_named(name), {})[rank] = tensor
    for path in sorted(tag.iterdir()):
        if match := _EXPERT.fullmatch(path.name):
            for name, tensor in _flat(load_pickle(path)):
                found.setdefault(_named(name), {})[int(match[3])] = tensor
    lost = [
        f"{name} of rank {rank}"
        for name, by in found.items()
        for rank in range(len(ranks))
        if rank not in by and EXPERTS not in name  # of experts that all ranks hold alike, one rank writes each
    ]
    if lost:
        raise CheckpointError(f"{tag} lacks pieces: {some(lost)}; copy the files of all ranks")
    return {name: [by[rank] for rank in sorted(by)] for name, by in found.items()}
