"""What a checkpoint records beside its tensors."""

import platform
from typing import TYPE_CHECKING, Any

import torch

from megatron.config.run import to_dict
from megatron.conversion.hf_extras import KEY as HUGGINGFACE
from megatron.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron.training.run import Run

_SPIKES = "spikes"  # the one hook whose state has a key of its own, from before there were others


def describe(run: "Run") -> dict[str, Any]:
    """The metadata of a checkpoint of ``run`` as it is now, JSON-able."""
    states = {hook.key: state for hook in run.hooks if (state := hook.state_dict())}
    return {
        "clock": run.clock.state(),
        "detours": run.skipped.state(),
        "spikes": states.pop(_SPIKES, {}),
        **({"hooks": states} if states else {}),
        "config": to_dict(run.config),
        "vocab_size": run.vocab_size,
        "tokenizer": {"vocab_size": run.tokenizer.vocab_size, "fingerprint": run.tokenizer.fingerprint},
        "optimizer": run.engine.scalar_state(),
        "world_size": run.topology.launch.world_size,
        "data": run.data.state.state(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **run.start.carried,
    }


def hook_states(meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of hooks in a checkpoint, by the hooks' names."""
    spikes = {_SPIKES: meta[_SPIKES]} if meta.get(_SPIKES) else {}
    return spikes | meta.get("hooks", {})


def carried(meta: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What later checkpoints keep of an earlier one's metadata, though training does not use it.

    That is where the run's first weights came from and, if the tokenizer is the same, what a Hugging Face folder held
    beside its weights.
    """
    same = meta["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    kept = ("finetuned_from", HUGGINGFACE) if same else ("finetuned_from",)
    return {name: meta[name] for name in kept if name in meta}
