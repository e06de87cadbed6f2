"""What a checkpoint records beside its tensors, and whether a run may continue from it."""

import dataclasses
import platform
from typing import Any

import torch

from megatron.checkpoint import CheckpointError
from megatron.config import RunConfig
from megatron.config.flags import to_dict
from megatron.data.tokenizer import Tokenizer
from megatron.training.clock import Clock

# A checkpoint's tensors fit only a run that agrees in these.
_STRUCTURE = {
    "model": (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "ffn_hidden_size",
        "seq_length",
        "max_position_embeddings",
    ),
    "moe": ("num_experts", "expert_interval", "mlp_type"),
}
# A run that changes these goes on, but not as it would have.
_CONTINUITY = {
    "training": ("train_tokens", "global_batch_size", "micro_batch_size", "rampup_batch_size", "seed"),
    "optimizer": ("lr", "min_lr", "lr_warmup_tokens", "lr_decay_tokens", "lr_decay_style", "precision"),
    "data": ("data_path", "split"),
    "moe": ("topk", "moe_train_capacity_factor", "moe_token_dropping", "moe_noise_policy", "moe_rts"),
}


def describe(
    config: RunConfig, clock: Clock, vocab_size: int, tokenizer: Tokenizer, optimizer: dict[str, Any], world_size: int
) -> dict[str, Any]:
    """The metadata of a checkpoint, JSON-able."""
    return {
        "clock": clock.state(),
        "config": to_dict(config),
        "vocab_size": vocab_size,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "optimizer": optimizer,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _differences(meta: dict[str, Any], config: RunConfig, fields: dict[str, tuple[str, ...]]) -> list[str]:
    now = to_dict(config)
    found = []
    for section, names in fields.items():
        then = meta["config"].get(section, {})
        found += [
            f"--{name.replace('_', '-')}: checkpoint {then.get(name)!r}, this run {now[section][name]!r}"
            for name in names
            if then.get(name) != now[section][name]
        ]
    return found


def check(meta: dict[str, Any], config: RunConfig, vocab_size: int, tokenizer: Tokenizer) -> list[str]:
    """Compare a checkpoint's metadata with the run that wants to continue from it.

    Returns:
        Differences that change how the run goes on; worth a warning.

    Raises:
        CheckpointError: the model or the tokenizer is another one.
    """
    problems = _differences(meta, config, _STRUCTURE)
    if meta["vocab_size"] != vocab_size:
        problems.append(f"padded vocabulary: checkpoint {meta['vocab_size']}, this run {vocab_size}")
    if meta["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        problems.append(
            f"tokenizer fingerprint: checkpoint {meta['tokenizer']['fingerprint'][:12]}, "
            f"this run {tokenizer.fingerprint[:12]}"
        )
    if problems:
        raise CheckpointError(
            "the checkpoint belongs to another model; start with the flags it was trained with, "
            "or give another --load:\n  " + "\n  ".join(problems)
        )
    return _differences(meta, config, _CONTINUITY)


def clock_from(meta: dict[str, Any]) -> Clock:
    """The clock as it stood when the checkpoint was saved."""
    return Clock(**{field.name: meta["clock"][field.name] for field in dataclasses.fields(Clock)})
