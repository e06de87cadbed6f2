"""Checkpoints of Megatron-DeepSpeed without a pipeline: tensor-parallel pieces, and a file for each expert.

    FOLDER/latest                                               the newest tag
    FOLDER/TAG/mp_rank_XX_model_states.pt                       all but the experts, of tensor-parallel rank XX
    FOLDER/TAG/layer_L_expert_E_mp_rank_XX_model_states.pt      expert E of MoE layer number L

They are pickles. torch's restricted unpickler reads them, which knows tensors and plain containers; beyond these, only
``argparse.Namespace`` (Megatron's arguments) and numpy's arrays (states of random generators) are allowed.

Letters: H hidden, N heads, D head size, F FFN hidden.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.contents import MODEL, Contents, Lazy, is_stacked, parameter_shapes, some
from megatron.checkpoint.formats.native import new_meta
from megatron.config import DataConfig, ModelConfig, MoEConfig, RunConfig
from megatron.config.flags import to_dict
from megatron.data.tokenizer import build_tokenizer

_reconstruct = numpy.empty(0).__reduce__()[0]
ALLOWED = [
    argparse.Namespace,
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype(numpy.uint32)),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # its name before and since numpy 2
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]

_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERTS = ".mlp.deepspeed_moe.experts.deepspeed_experts."
_MODULES = {  # of a layer: ours -> theirs, and the dimension that tensor-parallel ranks share, of weight and of bias
    "input_layernorm": ("input_layernorm", None, None),
    "post_attention_layernorm": ("post_attention_layernorm", None, None),
    "attention.qkv": ("attention.query_key_value", 0, 0),
    "attention.dense": ("attention.dense", 1, None),
    "mlp.fc1": ("mlp.dense_h_to_4h", 0, 0),
    "mlp.fc2": ("mlp.dense_4h_to_h", 1, None),
    "mlp.mlp.fc1": ("mlp.mlp.dense_h_to_4h", 0, 0),
    "mlp.mlp.fc2": ("mlp.mlp.dense_4h_to_h", 1, None),
    "mlp.router": ("mlp.deepspeed_moe.gate.wg", None, None),
    "mlp.coefficient": ("mlp.coefficient", None, None),
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": ("embedding.word_embeddings.weight", 0),
    "embedding.position_embeddings.weight": ("embedding.position_embeddings.weight", None),
    "final_layernorm.weight": ("encoder.final_layernorm.weight", None),
    "final_layernorm.bias": ("encoder.final_layernorm.bias", None),
}
_OF_EXPERT = {
    "w1": ("dense_h_to_4h.weight", 0),
    "b1": ("dense_h_to_4h.bias", 0),
    "w2": ("dense_4h_to_h.weight", 1),
    "b2": ("dense_4h_to_h.bias", None),
}
Pieces = list[torch.Tensor]  # of one tensor, by tensor-parallel rank


def is_megatron_deepspeed(folder: str | os.PathLike) -> bool:
    """Whether the folder looks like one of these, with or without the tag."""
    folder = Path(folder)
    return folder.is_dir() and any(_files(each) for each in (folder, *(p for p in folder.iterdir() if p.is_dir())))


def read_megatron_deepspeed(folder: str | os.PathLike, tokenizer_options: Mapping[str, str]) -> Contents:
    """The weights of a checkpoint; its optimizer's state is not read.

    Args:
        folder: with ``latest``, or of one tag.
        tokenizer_options: ``tokenizer_type`` and files; they are not in the folder.

    Raises:
        CheckpointError: a file is missing, damaged or holds other objects than tensors; a tensor is missing, unknown or
            of another shape; the model is one that is not known here.
        ValueError: of the tokenizer.
    """
    tag = _tag(Path(folder))
    ranks = [_load(tag / name) for name in _files(tag)]
    args = ranks[0].get("args")
    if args is None:
        raise CheckpointError(f"{tag} was saved without Megatron's arguments (args), so the heads are not known")
    version = float(ranks[0].get("checkpoint_version") or 0)
    found = _gather(tag, ranks)
    config = RunConfig(
        model=_model(args, tag), moe=_moe(args, found, tag), data=DataConfig(**_tokenizer(tokenizer_options, tag))
    )
    table = found.get("embedding.word_embeddings.weight")
    if not table:
        raise CheckpointError(f"{tag} has no embedding.word_embeddings.weight; it is no GPT of Megatron-DeepSpeed")
    vocab_size = sum(len(piece) for piece in table)
    tokenizer = build_tokenizer(config.data)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{tag}: the tokenizer has {tokenizer.vocab_size} ids, the token table {vocab_size} rows; give the model's "
            "own tokenizer by --tokenizer-type and its files"
        )
    described = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    origin = {"format": "megatron-deepspeed", "folder": str(tag.absolute()), "checkpoint_version": version}
    meta = new_meta(to_dict(config), vocab_size, described, config.model.seq_length, origin)
    tensors = _ours(found, config, vocab_size, version, tag)
    return Contents(str(tag), meta, tensors).check()


# --------------------------------------------------------------------------------------------------- files


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


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises whatever it likes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {forbidden[1]}, which is not allowed" if forbidden else lines[0]
        raise CheckpointError(
            f"{path} is damaged or holds something else than tensors and arguments: {why}. Nothing of it was run. "
            "Copy the file again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; expected a dictionary")
    return content


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
    return name.replace(".self_attention.", ".attention.")


def _gather(tag: Path, ranks: list[dict[str, Any]]) -> dict[str, Pieces]:
    """Every tensor's pieces by tensor-parallel rank, experts included, under one spelling of the names."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, content in enumerate(ranks):
        for name, tensor in _flat(content.get("module") or content.get("model") or {}):
            if not _named(name).startswith("word_embeddings_for_head"):  # the token table again
                found.setdefault(_named(name), {})[rank] = tensor
    for path in sorted(tag.iterdir()):
        if match := _EXPERT.fullmatch(path.name):
            for name, tensor in _flat(_load(path)):
                found.setdefault(_named(name), {})[int(match[3])] = tensor
    lost = [
        f"{name} of rank {rank}"
        for name, by in found.items()
        for rank in range(len(ranks))
        if rank not in by and _EXPERTS not in name  # of experts that all ranks hold alike, one rank writes each
    ]
    if lost:
        raise CheckpointError(f"{tag} lacks pieces: {some(lost)}; copy the files of all ranks")
    return {name: [by[rank] for rank in sorted(by)] for name, by in found.items()}


# ------------------------------------------------------------------------------------------- configuration


def _model(args: argparse.Namespace, tag: Path) -> ModelConfig:
    try:
        return ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            ffn_hidden_size=getattr(args, "ffn_hidden_size", None),
            seq_length=args.seq_length,
            max_position_embeddings=args.max_position_embeddings,
            layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
        )
    except AttributeError as error:
        raise CheckpointError(f"{tag}: its arguments have no {error.name}; it is no checkpoint of a GPT") from None


def _moe(args: argparse.Namespace, found: Mapping[str, Pieces], tag: Path) -> MoEConfig:
    counts: dict[int, int] = {}
    for name in found:
        if _EXPERTS in name:
            layer, expert = int(name.split(".")[2]), int(name.split(_EXPERTS)[1].split(".")[0])
            counts[layer] = max(counts.get(layer, 0), expert + 1)
    if not counts:
        return MoEConfig()
    interval = min(counts) + 1
    if sorted(counts) != list(range(interval - 1, args.num_layers, interval)):
        raise CheckpointError(f"{tag} has experts in layers {sorted(counts)}; every so-many-th layer is expected here")
    residual = any(".mlp.coefficient." in name for name in found)
    experts = tuple(counts[layer] for layer in sorted(counts))
    return MoEConfig(
        num_experts=experts if len(set(experts)) > 1 else experts[:1],
        expert_interval=interval,
        topk=getattr(args, "topk", 1),
        mlp_type="residual" if residual else "standard",
    )


def _tokenizer(options: Mapping[str, str], tag: Path) -> dict[str, str]:
    if not options:
        raise CheckpointError(
            f"{tag} holds no tokenizer; give the model's by --tokenizer-type with --vocab-file and --merge-file, or "
            "--tokenizer-model"
        )
    return dict(options)


# ------------------------------------------------------------------------------------------------- tensors


def _ours(
    found: Mapping[str, Pieces], config: RunConfig, vocab_size: int, version: float, tag: Path
) -> dict[str, Lazy]:
    left, problems, tensors = set(found), [], {}

    def take(theirs: str, dim: int | None, shape: tuple[int, ...]) -> Pieces | None:
        left.discard(theirs)
        pieces = found.get(theirs)
        if pieces is None:
            problems.append(f"{theirs} is missing")
            return None
        cut = tuple(size // len(pieces) if axis == dim else size for axis, size in enumerate(shape))
        fitting = (cut, shape) if _EXPERTS in theirs else (cut,)
        for piece in pieces:
            if tuple(piece.shape) not in fitting or piece.shape != pieces[0].shape:
                problems.append(f"{theirs} has a piece of {list(piece.shape)}, expected {list(cut)}")
                return None
        return pieces

    for name, shape in parameter_shapes(config.model, config.moe, vocab_size).items():
        made: list[Callable[[], torch.Tensor] | None] = []
        if name in _OUTSIDE:
            theirs, dim = _OUTSIDE[name]
            made = [_joiner(take(theirs, dim, shape), dim, shape)]
        else:
            _, layer, inside = name.split(".", 2)
            module, kind = inside.rsplit(".", 1)
            before = f"encoder.layers.{layer}"
            if module == "mlp.experts":
                theirs, dim = _OF_EXPERT[kind]
                there = shape[:0:-1]  # theirs are output-first
                for expert in range(shape[0]):
                    pieces = take(f"{before}{_EXPERTS}{expert}.{theirs}", dim, there)
                    made.append(_joiner(pieces, dim, there, True))
            else:
                theirs, of_weight, of_bias = _MODULES[module]
                dim = of_weight if kind == "weight" else of_bias
                pieces = take(f"{before}.{theirs}.{kind}", dim, shape)
                if pieces and module == "attention.qkv":
                    made = [_qkv(pieces, version, config.model)]
                else:
                    made = [_joiner(pieces, dim, shape)]
        if all(made):
            tensors[MODEL + name] = _lazy(made, name)
    left = {
        name for name in left if not name.startswith("word_embeddings_for_head") and not name.endswith("_extra_state")
    }
    problems += [f"{name} is no tensor of this model" for name in sorted(left)]
    if problems:
        raise CheckpointError(f"{tag} cannot be converted: {some(problems)}. Nothing was written")
    return tensors


def _joiner(
    pieces: Pieces | None, dim: int | None, shape: tuple[int, ...], transposed: bool = False
) -> Callable[[], torch.Tensor] | None:
    """What joins the pieces of a tensor of ``shape``. Where one piece is the whole (experts that tensor-parallel ranks
    keep alike, layer norms), it is taken from the first rank."""
    if not pieces:
        return None

    def join() -> torch.Tensor:
        whole = dim is None or tuple(pieces[0].shape) == tuple(shape)
        tensor = pieces[0] if whole else torch.cat(pieces, dim)
        return tensor.T if transposed and tensor.dim() == 2 else tensor

    return join


def _qkv(pieces: Pieces, version: float, model: ModelConfig) -> Callable[[], torch.Tensor]:
    """A rank's rows are [3, N, D] in checkpoint version 0, [N, D, 3] in 1.0, [N, 3, D] since 2.0; ours [3, N, D]."""
    N, D = model.num_attention_heads // len(pieces), model.hidden_size // model.num_attention_heads

    def join() -> torch.Tensor:
        parts = []
        for piece in pieces:
            rest = piece.shape[1:]
            if version >= 2:
                parts.append(piece.view(N, 3, D, *rest).transpose(0, 1))
            elif version >= 1:
                parts.append(piece.view(N, D, 3, *rest).movedim(2, 0))
            else:
                parts.append(piece.view(3, N, D, *rest))
        return torch.cat(parts, dim=1).flatten(0, 2)

    return join


def _lazy(made: list[Callable[[], torch.Tensor]], name: str) -> Lazy:
    first, stacked = made[0](), is_stacked(name)

    def read(row: int | None) -> torch.Tensor:
        if stacked:
            return torch.stack([join() for join in made]) if row is None else made[row]()
        return made[0]() if row is None else made[0]()[row]

    return Lazy((len(made), *first.shape) if stacked else tuple(first.shape), first.dtype, read)
