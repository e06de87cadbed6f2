"""What is in a checkpoint, for people and programs."""

from typing import Any

from megatron.checkpoint.tensors import dtype_name
from megatron.conversion.changes import tokens_seen
from megatron.conversion.contents import MODEL, Contents, is_learned
from megatron.conversion.formats import format_of


def inspect(folder: str, verify: bool) -> dict[str, Any]:
    """Describe a checkpoint, JSON-able.

    Args:
        folder: a run's folder, one checkpoint, or a Hugging Face folder.
        verify: compare every file with its checksum, and its header with the index. An exported Hugging Face folder is
            always compared with its checksums; one of other origin has none.

    Raises:
        CheckpointError: there is none, it is damaged, or its format is not inspected.
    """
    format_ = format_of(folder)
    found = format_.inspect(folder, verify)
    contents = found.contents
    meta, config = contents.meta, contents.config
    parallel = config.parallel
    return {
        "path": contents.where,
        "format": format_.name,
        "verified": found.verified,
        "standing": found.status,
        "step": contents.step,
        "tokens": tokens_seen(contents),
        "parameters": _parameters(contents),
        "bytes": sum(lazy.bytes for lazy in contents.tensors.values()),
        "optimizer": contents.has_optimizer,
        "written_by": {
            "processes": meta.get("world_size"),
            "tensor_parallel": parallel.tensor_model_parallel_size,
            "pipeline_stages": parallel.pipeline_model_parallel_size,
            "expert_parallel": list(parallel.moe_expert_parallel_size),
            "versions": meta.get("versions"),
        },
        "model": {
            "layers": config.model.num_layers,
            "hidden": config.model.hidden_size,
            "heads": config.model.num_attention_heads,
            "sequence": config.model.seq_length,
            "vocabulary": meta["vocab_size"],
            "experts": config.moe.experts_per_layer(config.model.num_layers),
        },
        "tokenizer": meta["tokenizer"],
        "origin": meta.get("origin"),
        "tensors": {
            name: {"shape": list(lazy.shape), "dtype": dtype_name(lazy.dtype)}
            for name, lazy in contents.tensors.items()
        },
    }


def in_words(about: dict[str, Any]) -> str:
    """The same as text."""
    wrote, model = about["written_by"], about["model"]
    checked = "verified" if about["verified"] else "not verified"
    counts = sorted(set(model["experts"]) - {1})
    experts = f"experts {counts}" if counts else "dense"
    lines = [
        f"{about['path']} ({about['format']}, checksums {checked})",
        f"step {about['step']}, {about['tokens']} tokens seen"
        + (f", {about['standing']}" if about["standing"] not in (None, "confirmed") else ""),
        f"{about['parameters']} parameters, {about['bytes'] / 1e9:.3f} GB, "
        f"{'with' if about['optimizer'] else 'without'} optimizer state",
        f"{model['layers']} layers, hidden {model['hidden']}, {model['heads']} heads, "
        f"sequences of {model['sequence']}, vocabulary {model['vocabulary']}, " + experts,
        f"layout: {wrote['processes'] or 'unknown number of'} processes, tensor parallel {wrote['tensor_parallel']}, "
        f"{wrote['pipeline_stages']} pipeline stages, expert parallel {wrote['expert_parallel']}; "
        "any other can load it",
    ]
    width = max(map(len, about["tensors"]))
    lines += [f"  {name:{width}}  {kind['dtype']:8}  {kind['shape']}" for name, kind in about["tensors"].items()]
    return "\n".join(lines)


def _parameters(contents: Contents) -> int:
    weights = (lazy for name, lazy in contents.tensors.items() if name.startswith(MODEL) and not is_learned(name))
    return sum(lazy.bytes // lazy.dtype.itemsize for lazy in weights)
