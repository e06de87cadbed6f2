"""Which files a checkpoint of Megatron-DeepSpeed has, and the shards of tensors in them.

FOLDER/latest                                               the newest tag
FOLDER/TAG/mp_rank_XX_model_states.pt                       all but the experts, of tensor-parallel rank XX
FOLDER/TAG/layer_L_expert_E_mp_rank_XX_model_states.pt      expert E of MoE layer number L
    FOLDER/TAG/layer_XX-model_YY-model_states.pt                of a pipeline: its module XX, of tensor-parallel rank YY

A pipeline numbers all of its modules: functions, which have no file, the embedding, the layers, the last layer norm,
the head. Which number is which differs between versions, so they are distinguished by what they hold. With experts it
has no files of modules, and each stage has its modules in mp_rank files of its own.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, some
from megatron.conversion.contents import Lazy
from megatron.conversion.megatron_deepspeed.names import EXPERTS
from megatron.conversion.pickles import load_pickle

Shards = list[Lazy]  # one tensor's, by tensor-parallel rank
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MODULE = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_VERSIONS = (0.0, 1.0, 2.0, 3.0)
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings", "iteration")
_DEEPEST = 50  # dictionaries in each other


@dataclasses.dataclass(frozen=True)
class MegatronCheckpoint:
    """What one checkpoint holds. Names are those within Megatron's ``language_model``, layers counted over all of the
    model."""

    where: Path
    args: Any
    version: float  # checkpoint_version: the order of rows in the projection to Q, K and V
    shards: dict[str, Shards]
    core: bool = False  # whether it is a model of megatron.core's


def lazy_of(tensor: torch.Tensor) -> Lazy:
    """A tensor that is on the disk already."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda row: tensor if row is None else tensor[row])


def row_of(lazy: Lazy, index: int) -> Lazy:
    """A row of a tensor as a tensor."""
    return Lazy(lazy.shape[1:], lazy.dtype, lambda row: lazy.read(index) if row is None else lazy.read(index)[row])


def has_files(folder: Path) -> bool:
    """Whether a folder, or one in it, has such files."""
    return folder.is_dir() and any(_files(each) for each in (folder, *(p for p in folder.iterdir() if p.is_dir())))


def find(folder: Path) -> MegatronCheckpoint:
    """The tensors of ``folder``, with ``latest`` or of one tag; they stay on the disk until they are read.

    Raises:
        CheckpointError: a file is missing, damaged or holds other objects than tensors.
    """
    tag = _tag(folder)
    ranks = [load_pickle(tag / name) for name in _files(tag)]
    args = ranks[0].get("args")
    check_same_run({name: rank for name, rank in zip(_files(tag), ranks, strict=True)}, tag)
    shards = _gather(tag, ranks, args)
    return MegatronCheckpoint(tag, args, float(ranks[0].get("checkpoint_version") or 0), shards)


def check_same_run(contents: Mapping[str, dict[str, Any]], where: Path) -> None:
    """Raise CheckpointError where files of ranks are not of one run: by the version and the sizes that they record."""
    facts = {
        name: {
            "checkpoint_version": float(content.get("checkpoint_version") or 0),
            **{size: getattr(content.get("args"), size, None) for size in _SIZES},
        }
        for name, content in contents.items()
        if content.get("args") is not None  # else there is another error to come
    }
    if not facts:
        return
    first, expected = next(iter(facts.items()))
    if expected["checkpoint_version"] not in _VERSIONS:
        raise CheckpointError(
            f"{where}: {first} has checkpoint_version {expected['checkpoint_version']:g}, expected one of "
            f"{', '.join(f'{version:g}' for version in _VERSIONS)}: the order of Q, K and V is not known of others"
        )
    for name, found in facts.items():
        for fact, value in found.items():
            if value != expected[fact]:
                raise CheckpointError(
                    f"{where}: {name} says {fact} {value}, {first} says {expected[fact]}; copy the files of one "
                    "checkpoint"
                )


def _files(tag: Path) -> list[str]:
    return sorted(path.name for path in tag.iterdir() if _RANK.fullmatch(path.name))


def _tag(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; give the folder that holds mp_rank_00_model_states.pt")
    tag = folder
    if (folder / "latest").is_file():
        name = (folder / "latest").read_text(errors="replace").strip()
        if Path(name).name != name or not (folder / name).is_dir():
            raise CheckpointError(f"{folder / 'latest'} names {name!r}, which is no folder in {folder}; restore it")
        tag = folder / name
    names = _files(tag)
    if not names:
        raise CheckpointError(
            f"{tag} holds no mp_rank_XX_model_states.pt; give the folder of Megatron-DeepSpeed's --save"
        )
    numbers = [int(match[1]) for name in names if (match := _RANK.fullmatch(name))]
    if missing := sorted(set(range(max(numbers) + 1)) - set(numbers)):
        raise CheckpointError(f"{tag} lacks mp_rank_{missing[0]:02d}_model_states.pt; copy it from where it was saved")
    return tag


def flat(content: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dictionaries, by their names joined with dots."""
    if depth > _DEEPEST:
        raise CheckpointError(f"dictionaries are nested more than {_DEEPEST} deep at {prefix[:80]}; this is no model")
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, torch.Tensor):
            yield prefix + name, value


def named(name: str) -> str:
    """One spelling of the names that different versions use."""
    name = re.sub(r"^(module\.|moe_state_dict\.)*(language_model\.)?", "", name)
    name = re.sub(r"^transformer\.", "encoder.", name)
    name = re.sub(r"\b(input|post_attention|final)_norm\.", r"\1_layernorm.", name)
    return name.replace(".attention.", ".self_attention.")


def tensor_ranks(args: Any) -> int | None:
    """Tensor-parallel ranks of the run that saved; None where its arguments do not tell."""
    return getattr(args, "tensor_model_parallel_size", None) or getattr(args, "model_parallel_size", None)


def _gather(tag: Path, ranks: list[dict[str, Any]], args: Any) -> dict[str, Shards]:
    """Every tensor's shards by tensor-parallel rank, experts included, under one spelling of the names."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, content in enumerate(ranks):
        module = content.get("module") or content.get("model")  # a pipeline has None here, or a path
        for name, tensor in flat(module) if isinstance(module, dict) else ():
            # left out: the token table again, and experts, which are in files of their own, once more
            if not named(name).startswith("word_embeddings_for_head") and EXPERTS not in name:
                found.setdefault(named(name), {})[rank] = tensor
    for path in sorted(tag.iterdir()):
        if match := _EXPERT.fullmatch(path.name):
            for name, tensor in flat(load_pickle(path)):
                by = found.setdefault(named(name), {})
                if f"{EXPERTS}{int(match[2])}." not in named(name) or int(match[3]) in by:
                    raise CheckpointError(
                        f"{path} holds {name}, which is not of expert {int(match[2])} or is in another file too; "
                        "remove what is not of this checkpoint, or copy the files again"
                    )
                by[int(match[3])] = tensor
        elif match := _MODULE.fullmatch(path.name):
            for name, tensor in flat(load_pickle(path)):
                found.setdefault(named(f"{int(match[1])}.{name}"), {})[int(match[2] or 0)] = tensor
    if any(name[0].isdigit() for name in found):
        found = _told_apart(tag, found, getattr(args, "num_layers", None))
    shards = {name: [lazy_of(by[rank]) for rank in sorted(by)] for name, by in found.items()}
    size = max((len(of) for name, of in shards.items() if ".layers." in name and EXPERTS not in name), default=1)
    if (expected := tensor_ranks(args) or size) != size:
        raise CheckpointError(
            f"{tag} holds files of {size} tensor-parallel ranks, and was saved by {expected}; copy the files of all "
            "ranks, and none of another checkpoint"
        )
    if other := [name for name, by in found.items() if EXPERTS in name and max(by) >= len(ranks)]:
        raise CheckpointError(
            f"{tag} holds {other[0]} of mp_rank_{max(found[other[0]]):02d}, where {len(ranks)} ranks saved; remove "
            "files of another checkpoint"
        )
    for name, of in shards.items():
        if (
            name.startswith("embedding.") and len(of) == 2 * size
        ):  # of the first stage, and of the last one for its head
            _check_tied(tag, name, of[:size], of[size:])
            shards[name] = of[:size]
    # of experts that all ranks hold alike, one rank writes each
    lost = [f"{name} has {len(of)} of {size}" for name, of in shards.items() if len(of) != size and EXPERTS not in name]
    if lost:
        raise CheckpointError(f"{tag} lacks shards: {some(lost)}; copy the files of all ranks")
    return shards


def _check_tied(tag: Path, name: str, *copies: Shards) -> None:
    """Raises CheckpointError where what stages keep alike is not alike."""
    for copy in copies[1:]:
        pairs = zip(copies[0], copy, strict=False)
        if len(copy) != len(copies[0]) or not all(torch.equal(a.read(None), b.read(None)) for a, b in pairs):
            raise CheckpointError(f"{tag}: {name} differs between stages; tied tables are needed here")


def _told_apart(tag: Path, found: dict[str, dict[int, torch.Tensor]], layers: int | None) -> dict[str, Any]:
    """A pipeline's tensors by the names that they have without one."""
    modules: dict[int, dict[str, dict[int, torch.Tensor]]] = {}
    told: dict[str, dict[int, torch.Tensor]] = {}
    for name, by in found.items():
        number, _, inside = name.partition(".")
        if number.isdigit():
            modules.setdefault(int(number), {})[inside] = by
        else:
            told[name.replace("tied_modules.embed.", "embedding.")] = by
    numbers = [number for number, inside in sorted(modules.items()) if "input_layernorm.weight" in inside]
    first = numbers[0] if numbers else 0
    wanted = set(range(first, first + (layers or len(numbers))))
    if missing := sorted(wanted - set(numbers)):
        raise CheckpointError(
            f"{tag} lacks module {missing[0]} of the pipeline, a layer; copy layer_{missing[0]:02d}-*"
        )
    for number, inside in sorted(modules.items()):
        if number in wanted:
            before = f"encoder.layers.{number - first}."
        elif set(inside) <= {"weight", "bias"}:
            before = "encoder.final_layernorm."
        elif "lm_head.weight" in inside:
            raise CheckpointError(
                f"{tag}: module {number} is an output layer that is not tied to the token table, which is needed here"
            )
        else:
            before = "embedding."
        for name, by in inside.items():
            copies = [told[before + name], by] if before + name in told else [by]
            _check_tied(tag, before + name, *([lazy_of(one[rank]) for rank in sorted(one)] for one in copies))
            told[before + name] = by
    return told
