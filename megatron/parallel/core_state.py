"""Registers this process's groups with Megatron-core, so that its own code and users can ask for them.

``parallel_state.initialize_model_parallel`` would create every group a second time, so its variables are set instead.
The groups of context parallelism, which is not supported, stay unset, and asking for one fails as it does there.
"""

import warnings
from typing import Any

import torch.distributed as dist


def register(
    *,
    tensor: dist.ProcessGroup,
    pipeline: dist.ProcessGroup,
    data: dist.ProcessGroup,
    model: dist.ProcessGroup,
    expert: dist.ProcessGroup | None,
    expert_data: dist.ProcessGroup | None,
) -> None:
    """Set Megatron-core's groups. It knows one degree of expert parallelism: None where layers differ in it."""
    state = _parallel_state()
    for name, group in (
        ("TENSOR_MODEL_PARALLEL", tensor),
        ("PIPELINE_MODEL_PARALLEL", pipeline),
        ("DATA_PARALLEL", data),
        ("MODEL_PARALLEL", model),
        ("EXPERT_MODEL_PARALLEL", expert),
        ("EXPERT_DATA_PARALLEL", expert_data),
    ):
        setattr(state, f"_{name}_GROUP", group)
    state._DATA_PARALLEL_GROUP_WITH_CP = data
    for name, group in (
        ("TENSOR_MODEL_PARALLEL_GLOBAL", tensor),
        ("PIPELINE_GLOBAL", pipeline),
        ("DATA_PARALLEL_GLOBAL", data),
        ("MODEL_PARALLEL_GLOBAL", model),
    ):
        setattr(state, f"_{name}_RANKS", dist.get_process_group_ranks(group))


def forget() -> None:
    """Unset them."""
    _parallel_state().destroy_model_parallel()


def _parallel_state() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core import parallel_state
    return parallel_state
