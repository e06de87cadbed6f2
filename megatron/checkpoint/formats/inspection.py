"""What a checkpoint holds, for people and for programs."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from megatron.checkpoint.folder import read_manifest
from megatron.checkpoint.formats.contents import MODEL
from megatron.checkpoint.formats.native import read_native
from megatron.checkpoint.tensors import dtype_name


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of a training checkpoint, JSON-able; its files are compared with their checksums first.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    contents = read_native(folder)
    path, meta, config = Path(contents.where), contents.meta, contents.config
    manifest = read_manifest(path)
    clock = meta["clock"]
    weights = [lazy for name, lazy in contents.tensors.items() if name.startswith(MODEL)]
    return {
        "checkpoint": str(path),
        "step": contents.step,
        "saved_at": manifest.saved_at,
        "tokens": clock["samples"] * clock["seq_length"],
        "samples": clock["samples"],
        "parameters": sum(lazy.bytes // lazy.dtype.itemsize for lazy in weights),
        "experts_of_layers": [config.moe.experts_of_layer(layer) for layer in range(config.model.num_layers)],
        "optimizer_state": contents.has_optimizer,
        "vocab_size": meta["vocab_size"],
        "tokenizer": meta["tokenizer"],
        "saved_by": {
            "world_size": meta.get("world_size"),
            "tensor_parallel": config.parallel.tensor_model_parallel_size,
            "pipeline_parallel": config.parallel.pipeline_model_parallel_size,
            "expert_parallel": list(config.parallel.moe_expert_parallel_size),
        },
        "origin": meta.get("origin"),
        "files": {name: dataclasses.asdict(record) for name, record in manifest.files.items()},
        "tensors": {
            name: {"shape": list(lazy.shape), "dtype": dtype_name(lazy.dtype)}
            for name, lazy in contents.tensors.items()
        },
    }


def in_words(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    layout = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found["saved_by"].items())
    lines = [
        f"{found['checkpoint']}: step {found['step']}, {found['tokens']:,} tokens seen",
        f"{found['parameters']:,} parameters; experts of each layer: {found['experts_of_layers']}",
        f"optimizer state: {'yes' if found['optimizer_state'] else 'no'}; vocabulary: {found['vocab_size']} rows",
        f"saved by: {layout} (loads in any other layout)",
        *(f"{name}  {record['size']:,} bytes  sha256 {record['sha256']}" for name, record in found["files"].items()),
        *(f"{name}  {tensor['dtype']}  {tensor['shape']}" for name, tensor in found["tensors"].items()),
    ]
    if found["origin"]:
        lines.insert(1, f"made from: {found['origin']}")
    return "\n".join(lines)
