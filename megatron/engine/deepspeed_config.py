"""The DeepSpeed configuration of a run: from the flags, and from the user's own JSON file."""

import json
from pathlib import Path
from typing import Any

from megatron.config import RunConfig
from megatron.config.errors import ConfigError, nearest

# What the flags decide already; a user's file may repeat it, not change it.
_OURS_ALONE = {
    "optimizer": "use --lr, --weight-decay, --adam-beta1 and their like",
    "scheduler": "use --lr-decay-style, --lr-warmup-tokens and --lr-decay-tokens",
    "pipeline": "use --pipeline-model-parallel-size",
    "zero_optimization.offload_optimizer": "use --optimizer-cpu-offload",
    "zero_optimization.offload_param": "keep the parameters on the device",
    "torch_autocast": "use --bf16 or --fp16",
    "amp": "use --bf16 or --fp16",
    "data_types": "gradients are accumulated in fp32",
    "communication_data_type": "use --grad-reduce-in-bf16, or nothing for fp32",
    "prescale_gradients": "the engine averages gradients itself",
    "gradient_predivide_factor": "the engine averages gradients itself",
    "timers": "the trainer logs tokens/s itself, and DeepSpeed's timer stops the GPU for every micro-batch",
}

# What else a file may say at its top level: DeepSpeed takes a key that it does not know for nothing.
_KNOWN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown"),
    *("dump_state", "memory_breakdown", "comms_logger", "flops_profiler", "tensorboard", "csv_monitor", "wandb"),
    *("sparse_gradients", "communication_data_type", "data_types", "disable_allgather", "seed"),
}

# What DeepSpeed does around each forward and backward pass.
_OF_EACH_PASS = ("wall_clock_breakdown", "memory_breakdown", "flops_profiler")


def from_flags(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration as the flags define it."""
    optimizer = config.optimizer
    settings: dict[str, Any] = {
        "train_batch_size": config.training.micro_batch_size * data_parallel_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the engine marks the last micro-batch itself: batches may ramp up
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": {"stage": 1},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # which would wait for the device at each micro-batch
        "zero_allow_untested_optimizer": True,
        # stages hand on activations as they are, not cut over the tensor-parallel processes
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if optimizer.optimizer_cpu_offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW: as fast, and nothing to compile
    if optimizer.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if optimizer.precision == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": optimizer.loss_scale,
            "initial_scale_power": optimizer.initial_loss_scale_power,
            "loss_scale_window": optimizer.loss_scale_window,
            "hysteresis": optimizer.hysteresis,
            "min_loss_scale": optimizer.min_loss_scale,
        }
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if optimizer.precision != "fp32":
        settings["communication_data_type"] = "bf16" if optimizer.grad_reduce_in_bf16 else "fp32"
    return settings


def merge(ours: dict[str, Any], theirs: dict[str, Any], config: RunConfig, where: str) -> dict[str, Any]:
    """Add a user's settings to ours.

    Raises:
        ConfigError: a setting contradicts the flags. ``"auto"`` agrees with everything, and the batch sizes may be
            given for the whole run (``train_batch_size`` as --global-batch-size).
    """
    problems = []
    batch = {"train_batch_size": config.training.global_batch_size}
    steps = theirs.get("gradient_accumulation_steps", "auto")
    whole_run = config.training.global_batch_size // ours["train_batch_size"]
    if steps not in ("auto", 1, whole_run):
        problems.append(
            f"{where}: gradient_accumulation_steps is {steps}, but global batch {config.training.global_batch_size} / "
            f"(micro batch x processes {ours['train_batch_size']}) = {whole_run}; set it to {whole_run} or 'auto'"
        )

    def add(into: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
        merged = dict(into)
        for key, value in extra.items():
            name = f"{path}{key}"
            if not path and key not in _KNOWN and key not in _OURS_ALONE:
                best = nearest(key, sorted(_KNOWN))
                problems.append(f"{where}: unknown key {key!r}; the nearest valid one is {best!r}")
                continue
            if name in _OURS_ALONE and into.get(key) != value:
                problems.append(f"{where}: {name!r} is not for this file; remove it: {_OURS_ALONE[name]}")
                continue
            if name == "gradient_accumulation_steps" or value == "auto":
                continue
            if key in into and isinstance(into[key], dict) != isinstance(value, dict):
                problems.append(f"{where}: {name} is {value!r}, expected something like {json.dumps(into[key])}")
                continue
            if isinstance(value, dict):
                merged[key] = add(merged.get(key, {}), value, f"{name}.")
                continue
            expected = batch.get(name, merged.get(key))
            if (name in batch or key in into) and expected is not None and value != expected:
                problems.append(f"{where}: {name} is {value!r}, but the flags say {expected!r}; make them agree")
            elif name not in batch:
                merged[key] = value
        return merged

    merged = add(ours, theirs, "")
    for precision in ("fp16", "bf16"):
        section = theirs.get(precision, {})
        if isinstance(section, dict) and section.get("enabled") is True and config.optimizer.precision != precision:
            problems.append(
                f"{where}: {precision}.enabled is true, but the flags say {config.optimizer.precision}; "
                f"add --{precision}"
            )
    if config.training.cuda_graphs:
        for key in _OF_EACH_PASS:
            section = theirs.get(key, False)
            if section is True or (isinstance(section, dict) and section.get("enabled") is True):
                problems.append(f"{where}: {key!r} sees nothing of a CUDA graph; remove it, or drop --cuda-graphs")
    if problems:
        raise ConfigError(*problems)
    return merged


def build(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run, the user's ``--deepspeed_config`` file merged in.

    Raises:
        ConfigError: the file is missing, is no JSON object, or contradicts the flags.
    """
    ours = from_flags(config, data_parallel_size)
    if config.parallel.deepspeed_config is None:
        return ours
    path = Path(config.parallel.deepspeed_config)
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {path}: {error}; give a readable JSON file") from None
    if not isinstance(theirs, dict):
        raise ConfigError(f"--deepspeed_config {path}: expected a JSON object, got {type(theirs).__name__}")
    return merge(ours, theirs, config, str(path))
