"""What can be done to a model between reading and writing it: another number format, an average, a layout's check."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from megatron.checkpoint.errors import CheckpointError, some
from megatron.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron.config.run import to_dict
from megatron.config.validation import validate_numbers
from megatron.conversion.contents import MODEL, Contents, Lazy, is_learned, without_optimizer


def cast(contents: Contents, dtype: torch.dtype) -> Contents:
    """The weights in another number format; an optimizer's state, and what balancers have learned, stay as they are."""
    tensors = {
        name: lazy.map(lambda tensor: tensor.to(dtype), dtype)
        if name.startswith(MODEL) and not is_learned(name)
        else lazy
        for name, lazy in contents.tensors.items()
    }
    return dataclasses.replace(contents, tensors=tensors)


def average(checkpoints: Sequence[Contents]) -> Contents:
    """The mean of the weights and of what balancers have learned, computed in float64, without optimizer state.

    Logits are linear in the router's weights, so a mean of biases fits a mean of weights.

    What else a checkpoint holds (clock, configuration, number format) is that of the one that has seen most tokens.

    Raises:
        CheckpointError: they are not of one model with one tokenizer; the difference is named.
    """
    first, *others = checkpoints
    for other in others:
        one, two = _identity(first), _identity(other)
        differ = [f"{name} {one.get(name)} and {two.get(name)}" for name in one | two if one.get(name) != two.get(name)]
        if differ:
            raise CheckpointError(
                f"{first.where} and {other.where} are different models and have no average: {some(differ)}; give "
                "checkpoints of one run"
            )
    newest = without_optimizer(max(checkpoints, key=tokens_seen))
    tensors = {
        name: Lazy(lazy.shape, lazy.dtype, _mean([each.tensors[name] for each in checkpoints], lazy.dtype))
        for name, lazy in newest.tensors.items()
    }
    meta = newest.meta | {"averaged": [each.where for each in checkpoints]}
    return dataclasses.replace(newest, tensors=tensors, meta=meta)


def _identity(contents: Contents) -> dict[str, object]:
    """What two checkpoints must agree in."""
    model, moe = contents.config.model, contents.config.moe
    shapes = {name: list(lazy.shape) for name, lazy in contents.tensors.items() if name.startswith(MODEL)}
    return {
        "tokenizer": contents.meta["tokenizer"]["fingerprint"][:12],
        "--num-attention-heads": model.num_attention_heads,
        "--layernorm-epsilon": model.layernorm_epsilon,
        "--topk": moe.topk,
        **shapes,
    }


def _mean(parts: list[Lazy], dtype: torch.dtype) -> Callable[[int | None], torch.Tensor]:
    def read(row: int | None) -> torch.Tensor:
        total = parts[0].read(row).double()
        for part in parts[1:]:
            total += part.read(row)
        return (total / len(parts)).to(dtype)

    return read


def tokens_seen(contents: Contents) -> int:
    """Tokens that the model was trained on; 0 where this is not known."""
    clock = contents.meta.get("clock", {})
    return clock.get("samples", 0) * clock.get("seq_length", 0)


def for_layout(contents: Contents, tensor: int, pipeline: int, experts: Sequence[int]) -> Contents:
    """The same checkpoint, which records the layout that it is meant for, if that layout can resume it.

    Nothing in the tensors changes: no checkpoint here depends on a layout.

    Args:
        contents: the checkpoint.
        tensor: tensor-parallel processes.
        pipeline: pipeline stages.
        experts: expert-parallel processes, one number for all MoE layers or one for each.

    Raises:
        ValueError: the layout does not fit this model; the rules and the nearest valid choices are named.
    """
    config, rows = contents.config, contents.meta["vocab_size"]
    if not config.moe.enabled and tuple(experts) != (1,):
        raise ValueError(f"--ep {' '.join(map(str, experts))}: a dense model has no experts to share; leave --ep out")
    if min(tensor, pipeline, *experts) < 1:
        raise ValueError(f"--tp {tensor}, --pp {pipeline}, --ep {' '.join(map(str, experts))}: use 1 or more")
    if rows % tensor:
        possible = ", ".join(str(size) for size in range(1, 65) if rows % size == 0)
        raise ValueError(
            f"--tp {tensor}: the padded vocabulary of {rows} cannot be shared evenly by {tensor} processes; use one of "
            f"{possible}"
        )
    layout = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "moe_expert_parallel_size": tuple(experts),
    }
    check_model(config.model, config.moe, ParallelConfig(**layout))
    recorded = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **layout))
    return dataclasses.replace(contents, meta=contents.meta | {"config": to_dict(recorded)})


def check_model(model: ModelConfig, moe: MoEConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError where training would not start, with as many processes as the layout needs at least."""
    # enough processes for any degree of expert parallelism, so that each that fits is proposed
    replicas = math.lcm(*parallel.moe_expert_parallel_size, *moe.num_experts)
    # what a later run chooses for itself is chosen such that it fits
    batch = parallel.pipeline_model_parallel_size * replicas
    training = TrainingConfig(micro_batch_size=1, global_batch_size=batch, train_tokens=2**50)
    config = RunConfig(model=model, moe=moe, parallel=parallel, training=training)
    validate_numbers(config, replicas * parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
