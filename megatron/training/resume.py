"""What a checkpoint records beside its tensors, and whether a run may continue from it."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import CheckpointError, load
from megatron.config import RunConfig
from megatron.config.flags import from_dict, to_dict
from megatron.config.options import OPTIONS
from megatron.data.data_state import DataState
from megatron.data.tokenizer import Tokenizer
from megatron.engine.engine import Engine
from megatron.parallel.initialize import Topology
from megatron.training.clock import Clock
from megatron.training.spikes import Detours, SpikeWatch

# Options that may change at a resume without changing how the run goes on.
_HARMLESS = {
    # the data are compared by their content, and go on in the order of the checkpoint's seed
    *("data_path", "split", "change_blend"),
    *("device", "num_workers", "data_cache_path", "vocab_file", "merge_file", "tokenizer_model", "tokenizer_type"),
    *("eod_token", "allow_tokenizer_mismatch"),
    *("eval_interval", "eval_iters", "checkpoint_activations", "max_skipped_updates", "moe_eval_capacity_factor"),
    *("skip_samples", "check_replicas", "compile", "optimizer_cpu_offload", "cuda_graphs", "deterministic"),
    *("ffn_hidden_size", "max_position_embeddings", "num_experts", "expert_interval", "make_vocab_size_divisible_by"),
}
_COMPARED = ("model", "moe", "optimizer", "training", "data")


def describe(
    config: RunConfig,
    clock: Clock,
    detours: Detours,
    spikes: SpikeWatch,
    vocab_size: int,
    tokenizer: Tokenizer,
    optimizer: dict[str, Any],
    world_size: int,
    data: DataState,
) -> dict[str, Any]:
    """The metadata of a checkpoint, JSON-able."""
    return {
        "clock": clock.state(),
        "detours": detours.state(),
        "spikes": spikes.state(),
        "config": to_dict(config),
        "vocab_size": vocab_size,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "optimizer": optimizer,
        "world_size": world_size,
        "data": data.state(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def carried(meta: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What the next checkpoints keep of an earlier one's metadata: what a model brought from Hugging Face, of which
    nothing is used in training, as long as it has the same tokenizer."""
    same = meta["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    return {"huggingface": meta["huggingface"]} if same and "huggingface" in meta else {}


def _structure(config: RunConfig) -> dict[str, Any]:
    """What a model must agree in for the tensors of a checkpoint to fit, under the names of the flags."""
    model, moe = config.model, config.moe
    return {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--ffn-hidden-size": model.ffn_size,
        "--seq-length": model.seq_length,
        "--max-position-embeddings": model.position_rows,
        "--num-experts of each layer": [moe.experts_of_layer(layer) for layer in range(model.num_layers)],
        "--mlp-type": moe.mlp_type if moe.enabled else "standard",
    }


def _describe(differences: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{flag}: checkpoint {then!r}, this run {now!r}" for flag, (then, now) in differences.items()]


def check(meta: dict[str, Any], config: RunConfig, vocab_size: int, tokenizer: Tokenizer) -> list[str]:
    """Compare a checkpoint's metadata with the run that wants to continue from it.

    Returns:
        Differences that change how the run goes on; worth a warning.

    Raises:
        CheckpointError: the model or the tokenizer is another one.
    """
    saved = from_dict(meta["config"])
    then, now = _structure(saved), _structure(config)
    problems = _describe({flag: (then[flag], now[flag]) for flag in now if then[flag] != now[flag]})
    if meta["vocab_size"] != vocab_size:
        problems.append(f"padded vocabulary: checkpoint {meta['vocab_size']}, this run {vocab_size}")
    changed = {}
    if meta["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        fingerprints = (meta["tokenizer"]["fingerprint"][:12], tokenizer.fingerprint[:12])
        if config.data.allow_tokenizer_mismatch:
            changed["tokenizer fingerprint"] = fingerprints
        else:
            ends = [each.data.eod_token for each in (saved, config)]
            named = "" if ends[0] == ends[1] else f", --eod-token {ends[0]!r} and {ends[1]!r}"
            problems.append(
                f"tokenizer fingerprint: checkpoint {fingerprints[0]}, this run {fingerprints[1]}{named} "
                "(--allow-tokenizer-mismatch goes on all the same)"
            )
    if problems:
        raise CheckpointError(
            "the checkpoint belongs to another model; start with the flags it was trained with, "
            "or give another --load:\n  " + "\n  ".join(problems)
        )
    for section in _COMPARED:
        before, after = vars(getattr(saved, section)), vars(getattr(config, section))
        for name, value in after.items():
            option = OPTIONS[name]
            flag = f"--{name.replace('_', '-')}" if option.opposite else option.flag
            if name not in _HARMLESS and flag not in now and before[name] != value:
                changed[flag] = (before[name], value)
    return _describe(changed)


def padded_as_before(meta: dict[str, Any], tensor_parallel_size: int) -> int:
    """The padded vocabulary of the checkpoint, which a run keeps in whatever layout it goes on.

    Raises:
        CheckpointError: these tensor-parallel processes cannot share it.
    """
    rows = meta["vocab_size"]
    if rows % tensor_parallel_size:
        possible = ", ".join(str(size) for size in range(1, 65) if rows % size == 0)
        raise CheckpointError(
            f"the checkpoint's padded vocabulary of {rows} cannot be shared evenly by --tensor-model-parallel-size"
            f" {tensor_parallel_size}; resume it with one of {possible}"
        )
    return rows


def clock_from(meta: dict[str, Any]) -> Clock:
    """The clock as it stood when the checkpoint was saved."""
    return Clock(**{field.name: meta["clock"][field.name] for field in dataclasses.fields(Clock)})


def restore(engine: Engine, source: Path, meta: dict[str, Any], topology: Topology) -> None:
    """Load a checkpoint into an engine. Where it holds no optimizer state, Adam starts anew.

    Raises:
        CheckpointError: it is damaged or does not fit.
    """
    with engine.loading(moments=meta.get("optimizer") is not None) as tensors:
        load(source, tensors, group=topology.control_group)
    engine.load_scalar_state(meta.get("optimizer"))
