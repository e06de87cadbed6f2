"""Hugging Face folders: stock GPT2LMHeadModel, or GPTMoEForCausalLM for experts or norms of queries and keys.

The token table keeps its padding rows, so that logits and losses are the same; ``suppress_tokens`` in
generation_config.json keeps them from being sampled. ``megatron_moe.json`` beside the model holds what Hugging Face's
files have no place for (our configuration, the tokens seen) and a checksum of each file; with it the way back is exact.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, some
from megatron.checkpoint.folder import FileRecord, damage, hash_file
from megatron.checkpoint.tensors import Deferred, dtype_name
from megatron.config import DataConfig, ParallelConfig, RunConfig
from megatron.config.errors import ConfigError
from megatron.config.run import from_dict, to_dict
from megatron.conversion.changes import check_model
from megatron.conversion.contents import (
    MODEL,
    Contents,
    Lazy,
    buffer_shapes,
    initial_buffer,
    is_learned,
    is_stacked,
    parameter_shapes,
)
from megatron.conversion.hf_config import from_hf, is_gpt2, to_hf
from megatron.conversion.hf_extras import KEY, read_extras, replace_unknown_ids, write_json
from megatron.conversion.hf_names import HFTensor, hf_tensors
from megatron.conversion.hf_tokenizer import write_tokenizer
from megatron.conversion.hf_tokenizer_import import find_tokenizer
from megatron.conversion.job import TOKENIZER_FILES
from megatron.conversion.native import new_meta
from megatron.conversion.output import staged
from megatron.conversion.shards import read_json, read_shards, write_shards
from megatron.data.tokenizer import Tokenizer, build_tokenizer

SIDECAR = "megatron_moe.json"
CODE = ("attention_gpt_moe.py", "configuration_gpt_moe.py", "modeling_gpt_moe.py")
SHARD = 5_000_000_000
_HEAD, _TABLE = "lm_head.weight", "transformer.wte.weight"
_ONE_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")  # of exports of earlier versions
_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old versions of transformers saved with the weights


# ------------------------------------------------------------------------------------------------- writing


def write_hf(
    contents: Contents, folder: str | os.PathLike, tokenizer: Tokenizer, files: Mapping[str, str], shard: int = SHARD
) -> Path:
    """Write a model for Hugging Face's libraries; needs neither a GPU nor these libraries.

    Args:
        contents: the model; an optimizer's state must have been dropped.
        folder: where to.
        tokenizer: the model's.
        files: the tokenizer's files, by option.
        shard: bytes of a model file, at most.

    Raises:
        CheckpointError: the folder is taken, the disk is too small, tensors have several data types, or reading failed;
            nothing is left behind.
    """
    contents.check()
    if contents.has_optimizer:
        raise CheckpointError(f"{contents.where}: Hugging Face's format has no optimizer state; add --drop-optimizer")
    config, vocab_size = contents.config, contents.meta["vocab_size"]
    tensors = [
        (part.theirs, _deferred(contents.tensors[MODEL + part.ours], part))
        for part in hf_tensors(config.model, config.moe, vocab_size)
    ]
    extras = contents.meta.get(KEY) or {}
    ids = extras.get("config") or {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod}
    about = to_hf(config.model, config.moe, vocab_size, ids, dtype_name(contents.dtype))
    with staged(folder, sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)) as temporary:
        copies = write_tokenizer(tokenizer, files, temporary, config.model.position_rows, extras)
        write_json(temporary / "config.json", about)
        write_json(temporary / "generation_config.json", _generation(extras, ids, tokenizer, vocab_size))
        if not is_gpt2(config.model, config.moe):
            for name in CODE:
                shutil.copyfile(Path(__file__).with_name("hf_moe") / name, temporary / name)
        records = {path.name: FileRecord(path.stat().st_size, hash_file(path)) for path in temporary.iterdir()}
        records |= write_shards(temporary, tensors, shard)
        sidecar = {
            "format": 1,
            "step": contents.step,
            "meta": contents.meta,
            "tokenizer_files": copies,
            "files": {name: dataclasses.asdict(record) for name, record in sorted(records.items())},
        }
        write_json(temporary / SIDECAR, sidecar)
    return Path(folder)


def _deferred(lazy: Lazy, part: HFTensor) -> Deferred:
    def make() -> torch.Tensor:
        tensor = lazy.read(None)
        return tensor.T if part.transposed else tensor

    rows = (lambda: map(lazy.read, range(part.shape[0]))) if is_stacked(part.ours) else None
    return Deferred(torch.Size(part.shape), lazy.dtype, make, rows)


def _generation(
    extras: Mapping[str, Any], ids: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> dict[str, Any]:
    """The content of generation_config.json: as it came, or the ids; without the table's padding rows."""
    own: dict[str, Any] | None = extras.get("generation_config")
    if own is None:
        own = {"pad_token_id": tokenizer.eod} | {key: token for key, token in ids.items() if token is not None}
    padding = range(tokenizer.vocab_size, vocab_size)
    suppressed = sorted({*(own.get("suppress_tokens") or ()), *padding})
    return own | ({"suppress_tokens": suppressed} if suppressed else {})


# ------------------------------------------------------------------------------------------------- reading


def has_checksums(folder: str | os.PathLike) -> bool:
    """Whether the folder is an export of :func:`write_hf`, whose files are compared with their checksums when read."""
    return (Path(folder) / SIDECAR).is_file()


def read_hf(folder: str | os.PathLike, tokenizer_options: Mapping[str, str]) -> Contents:
    """A GPT-2 of any origin, or an export of :func:`write_hf`.

    Args:
        folder: with config.json and the model files.
        tokenizer_options: ``tokenizer_type`` and files, where they are not in the folder.

    Raises:
        CheckpointError: something is missing, damaged, unknown or contradicts the configuration; it is named.
        ValueError: of the tokenizer.
    """
    folder = Path(folder)
    about = read_json(folder / "config.json")
    model, moe, vocab_size = from_hf(about, str(folder / "config.json"))
    sidecar = _read_sidecar(folder)
    theirs = _their_tensors(folder, model.num_layers, (vocab_size, model.hidden_size))
    step, notes = 0, []
    if sidecar is None:
        try:
            check_model(model, moe, ParallelConfig())
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'config.json'} describes a model that cannot exist: {error}") from None
        extras, notes = read_extras(folder, about, with_tokenizer=not tokenizer_options.keys() - {"eod_token"})
        tokenizer, options, name_of, told = find_tokenizer(folder, tokenizer_options, extras)
        notes += told + replace_unknown_ids(extras, tokenizer, name_of)
        config = RunConfig(model=model, moe=moe, data=DataConfig(**{**options}))
        described = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
        origin = {"format": "hf", "folder": str(folder.absolute()), "architectures": about.get("architectures")}
        meta = new_meta(to_dict(config), vocab_size, described, model.seq_length, origin) | {KEY: extras}
    else:
        meta, step = sidecar["meta"], sidecar["step"]
        config = from_dict(meta["config"])
        options = {field: str(folder / name) for field, name in sidecar["tokenizer_files"].items()}
        options |= tokenizer_options
        tokenizer = build_tokenizer(dataclasses.replace(config.data, **options))
        if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise CheckpointError(
                f"the tokenizer's files that were given are not those that {folder} was trained with, which are in it; "
                "drop --tokenizer-type and its files"
            )
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's token table {vocab_size} rows; give "
            "the model's own tokenizer by --tokenizer-type and its files"
        )
    files = {field: options[field] for field in TOKENIZER_FILES if field in options}
    tensors = _ours(theirs, config, vocab_size, folder)
    return Contents(str(folder), meta, tensors, step, files, notes).check()


def _read_sidecar(folder: Path) -> dict[str, Any] | None:
    if not (folder / SIDECAR).exists():
        return None
    content = read_json(folder / SIDECAR)
    try:
        if content["format"] != 1:
            raise CheckpointError(f"{folder / SIDECAR} is of format {content['format']}; this version reads format 1")
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
        from_dict(content["meta"]["config"])
        for key in ("vocab_size", "tokenizer"):
            content["meta"][key]
        content["tokenizer_files"].items()
        content["step"] + 0
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / SIDECAR} is damaged: {type(error).__name__}: {error}. Restore it; or remove it, and the "
            "folder is read like any other model's"
        ) from None
    problems = [problem for name, record in records.items() if (problem := damage(folder, name, record))]
    if problems:
        raise CheckpointError(
            f"{folder} is not as it was exported: {some(problems)}. Restore the files; or, if they were changed on "
            f"purpose, remove {SIDECAR}, and the folder is read like any other model's"
        )
    return content


def _their_tensors(folder: Path, layers: int, table: tuple[int, int]) -> dict[str, Lazy]:
    """Each tensor of the folder by its full name.

    Compared with the configuration's number of layers and shape of the token table before a model of these sizes is
    made: a damaged configuration may name any.
    """
    found = read_shards(folder)
    theirs = {
        name if name.startswith(("transformer.", _HEAD)) else "transformer." + name: t for name, t in found.items()
    }
    if len(theirs) < len(found):
        raise CheckpointError(
            f"{folder} has tensors under two names, with and without 'transformer.'; keep one of each"
        )
    there = max((int(match[1]) + 1 for name in theirs if (match := _LAYER.match(name))), default=0)
    if there != layers:
        raise CheckpointError(
            f"{folder} cannot be converted: its tensors are of {there} layers, and its configuration describes "
            f"{layers}. Nothing was written; restore the file that was changed"
        )
    if _TABLE in theirs and theirs[_TABLE].shape != table:
        raise CheckpointError(
            f"{folder} cannot be converted: {_TABLE} is {list(theirs[_TABLE].shape)}, and its configuration describes "
            f"{list(table)}. Nothing was written; restore the file that was changed"
        )
    return theirs


def _ours(theirs: dict[str, Lazy], config: RunConfig, vocab_size: int, folder: Path) -> dict[str, Lazy]:
    """Our tensors, made of theirs, of which each must be used."""
    left = set(theirs)
    problems: list[str] = []
    parts: dict[str, list[HFTensor]] = {}
    stacked = not any(_ONE_EXPERT.search(name) for name in theirs)
    for part in hf_tensors(config.model, config.moe, vocab_size, stacked):
        parts.setdefault(part.ours, []).append(part)
        left.discard(part.theirs)
        if part.theirs not in theirs:
            problems.append(f"{part.theirs} is missing")
        elif theirs[part.theirs].shape != part.shape:
            problems.append(f"{part.theirs} is {list(theirs[part.theirs].shape)}, expected {list(part.shape)}")
        elif not (kind := theirs[part.theirs].dtype).is_floating_point:
            problems.append(f"{part.theirs} is {dtype_name(kind)}, expected floating-point numbers")
        elif (first := theirs[parts[part.ours][0].theirs].dtype) != kind:
            problems.append(f"{part.theirs} is {dtype_name(kind)}, the layer's first expert {dtype_name(first)}")
    left = {name for name in left if not name.endswith(_MASKS)}
    if _HEAD in left and _TABLE in theirs:
        left.discard(_HEAD)
        if not torch.equal(theirs[_HEAD].read(None), theirs[_TABLE].read(None)):
            problems.append(f"{_HEAD} differs from {_TABLE}: the output layer is not tied, which is needed here")
    problems += [f"{name} is no tensor of this model" for name in sorted(left)]
    if problems:
        raise CheckpointError(f"{folder} cannot be converted: {some(problems)}. Nothing was written")
    described = config.model, config.moe, vocab_size
    shapes = parameter_shapes(*described) | buffer_shapes(*described)
    return {
        MODEL + name: _joined(name, shape, parts[name], theirs)
        if name in parts
        else initial_buffer(name, shape, config.moe)  # of training alone, so they have none
        for name, shape in shapes.items()
    }


def _joined(name: str, shape: tuple[int, ...], parts: list[HFTensor], theirs: dict[str, Lazy]) -> Lazy:
    def one(part: HFTensor) -> torch.Tensor:
        tensor = theirs[part.theirs].read(None)
        return tensor.T if part.transposed else tensor

    def read(row: int | None) -> torch.Tensor:
        if not is_stacked(name):
            return one(parts[0]) if row is None else one(parts[0])[row]
        if parts[0].row is None:
            return theirs[parts[0].theirs].read(row)
        return one(parts[row]) if row is not None else torch.stack([one(part) for part in parts])

    lazy = Lazy(shape, theirs[parts[0].theirs].dtype, read)
    return lazy.map(lambda tensor: tensor.float(), torch.float32) if is_learned(name) else lazy
