"""The published runs as presets: shape and hyperparameters of each, selected by ``--model NAME``.

Sources: "DeepSpeed-MoE for NLG: Reducing the training cost of language models by 5 times" (2021), the launch scripts
published with it, and the GPT-3 paper (arXiv 2005.14165) for the dense 125M model. They used 64 GPUs.

Two things differ from the publication:

- Precision is bf16, this project's default; the published runs used fp16 with dynamic loss scaling (``--fp16``).
- ``moe_eval_capacity_factor`` stays None although the published recipes list 1.0: validation that drops tokens
  depends on what else is in the batch, so by default it drops nothing here.

The dense 1.3B and 6.7B runs used tensor parallelism of 4 and 8, hence 16 and 8 data-parallel replicas; their batch
ramp-up from 32 sequences fits that many, and needs changing (``--rampup-batch-size``) for another number.

6.7B+MoE-128 was not published. It has the batches and learning rates of 6.7B and the experts of 1.3B+MoE-128, whose
matrices are cut over the tensor-parallel processes because they are large. It is meant for 128 GPUs of 80 GB.

A recipe (``--recipe NAME``) is what goes beyond the publication to keep experts balanced and training stable, for any
preset or model. ``recipes.py`` applies it.
"""

from typing import Any

_BILLION = 10**9

_COMMON: dict[str, Any] = {
    "seq_length": 2048,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "train_tokens": 300 * _BILLION,
    "lr_warmup_tokens": 375 * 10**6,
    "lr_decay_style": "cosine",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "checkpoint_activations": True,
    "split": "98,2,0",
    "eval_interval": 100,
    "eval_iters": 10,
    "log_interval": 10,
}


def _dense(layers: int, hidden: int, heads: int, init_std: float) -> dict[str, Any]:
    return {
        **_COMMON,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "init_method_std": init_std,
        "lr_decay_tokens": 260 * _BILLION,
    }


def _experts(count: int) -> dict[str, Any]:
    """``count`` experts in every other layer, top-1."""
    return {
        "num_experts": (count,),
        "expert_interval": 2,
        "topk": 1,
        "mlp_type": "standard",
        "moe_train_capacity_factor": 1.0,
        "moe_eval_capacity_factor": None,
        "moe_min_capacity": 4,
        "moe_token_dropping": True,
        "moe_expert_parallel_size": (64,),
        "lr_decay_tokens": 300 * _BILLION,
    }


def _batch(global_batch: int, micro_batch: int, rampup: tuple[int, int, int] | None = None) -> dict[str, Any]:
    return {"global_batch_size": global_batch, "micro_batch_size": micro_batch, "rampup_batch_size": rampup}


def _rate(lr: float, min_lr: float) -> dict[str, Any]:
    return {"lr": lr, "min_lr": min_lr}


def _tensor_parallel(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size}


_125M = _dense(12, 768, 12, init_std=0.02)
_350M = _dense(24, 1024, 16, init_std=0.014)
_1_3B = _dense(24, 2048, 16, init_std=0.014)
_6_7B = _dense(32, 4096, 32, init_std=0.01)

PRESETS: dict[str, dict[str, Any]] = {
    "125M": _125M | _batch(256, 4) | _rate(6e-4, 6e-5),
    "125M+MoE-64": _125M | _experts(64) | {"init_method_std": 0.014} | _batch(256, 4) | _rate(4.5e-4, 4.5e-6),
    "350M": _350M | _batch(256, 4) | _rate(3e-4, 3e-5),
    "350M+MoE-128": _350M | _experts(128) | _batch(256, 4) | _rate(2e-4, 2e-6),
    "1.3B": _1_3B | _batch(512, 2, rampup=(32, 32, 1_953_125)) | _rate(2e-4, 2e-5) | _tensor_parallel(4),
    "1.3B+MoE-128": _1_3B | _experts(128) | _batch(512, 8) | _rate(1.2e-4, 1e-6),
    "6.7B": _6_7B | _batch(1024, 4, rampup=(32, 32, 4_882_812)) | _rate(1.2e-4, 1.2e-5) | _tensor_parallel(8),
    "6.7B+MoE-128": _6_7B
    | _experts(128)
    | _batch(1024, 4)
    | _rate(1.2e-4, 1.2e-5)
    | _tensor_parallel(8)
    | {"moe_expert_parallel_size": (16,), "enable_expert_tensor_parallelism": True, "sequence_parallel": True},
}
"""Preset name -> field name -> value."""

UNPUBLISHED = ("6.7B+MoE-128",)
"""Presets of models that were not published."""

RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    "recommended": {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_router_center_input": True,
        "moe_token_dropping": False,
        "qk_layernorm": True,
    },
}
"""Recipe name -> field name -> value. Options of experts are left out for dense models."""
