"""Everything we use of DeepSpeed that is not its documented interface, in one place.

Two more are elsewhere: ``pipeline_module.py`` overrides ``PipelineModule._partition_layers`` and ``forward``
and ``TiedLayerSpec.build``, and reads ``_num_layers``; ``bf16_update.py`` takes over from ``BF16_Optimizer``. The
number of micro-batches changes by the documented ``set_train_batch_size``.

Written for the DeepSpeed version pinned in setup.py. ``tests/engine/test_deepspeed_internals.py`` fails when an upgrade
changes any of it.
"""

import dataclasses
import logging
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils import groups, logger
from torch import nn
from torch.distributed import ProcessGroup

from megatron.config import RunConfig
from megatron.engine.optim import OPTIMIZERS, ShardedOptimizer
from megatron.engine.optim.base import StateSlice
from megatron.parallel.initialize import Topology
from megatron.parallel.sharding import ParamLayout

# On CPUs DeepSpeed compiles this operator when it starts. Nothing here calls it, and there may be no compiler.
SHARED_MEMORY_OP = "deepspeed_shm_comm"


def start() -> None:
    """Let DeepSpeed know the processes that torch.distributed has brought together.

    Nothing is compiled, and what DeepSpeed says about its own progress is not printed.
    """
    logger.setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    warnings.filterwarnings("ignore", message=r".*c10d::broadcast_: an autograd kernel was not registered")  # of a tie
    warnings.filterwarnings("ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated")
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    for ours in OPTIMIZERS.values():  # else it warns of an optimizer that it has not tested
        if ours not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(ours)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


class ExpertMarker(MoE):
    """Tells DeepSpeed that a model has experts which ``degree`` processes share.

    DeepSpeed treats expert parameters apart only if it finds one of its own MoE layers among the model's modules. Ours
    is not one, so the model carries this one beside it.

    The gradient norm of each optimizer group is reduced over all pipeline stages, so all must have the same groups. For
    a stage without experts of this degree (``empty``) the marker has a weight and a bias of none: zeros whose gradient
    is zero.
    """

    def __init__(self, num_experts: int, degree: int, *, empty: bool = False) -> None:
        nn.Module.__init__(self)
        if empty:
            self.weight, self.bias = nn.Parameter(torch.zeros(1, 1, 1)), nn.Parameter(torch.zeros(1, 1))
        self.num_experts = num_experts
        self.num_local_experts = num_experts // degree
        self.ep_size = degree
        self.expert_group_name = expert_group_name(degree)

    def param_layouts(self) -> dict[str, ParamLayout]:
        """The placeholder of experts is treated as experts."""
        return {name: ParamLayout(expert_degree=self.ep_size) for name, _ in self.named_parameters()}

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to do: the groups exist already."""


def expert_markers(config: RunConfig, layouts: Mapping[str, ParamLayout]) -> nn.ModuleList:
    """A marker for each degree of expert parallelism in the run, whatever part of its model has these layouts."""
    here = {layout.expert_degree for layout in layouts.values()}
    degrees = config.expert_parallel_degrees()
    return nn.ModuleList(ExpertMarker(max(config.expert_counts(d)), d, empty=d not in here) for d in degrees)


def expert_group_name(degree: int) -> str:
    """DeepSpeed's name of the groups for one degree of expert parallelism."""
    return f"ep_size_{degree}"


class ModelParallelUnit:
    """What DeepSpeed asks about tensor, pipeline and data parallelism (its ``mpu``), answered by our topology."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks that hold the same part of the model."""
        return self._topology.data_parallel_group

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._topology.data_parallel_size

    def get_data_parallel_rank(self) -> int:
        """This one's place among them."""
        return self._topology.data_parallel_rank

    def get_model_parallel_group(self) -> ProcessGroup:
        """Ranks that hold one copy of the model: tensor-parallel ranks of all pipeline stages."""
        return self._topology.model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._topology.tensor_parallel_size * self._topology.pipeline_parallel_size

    def get_model_parallel_rank(self) -> int:
        """This one's place among them."""
        stage = self._topology.pipeline_parallel_rank
        return stage * self._topology.tensor_parallel_size + self._topology.tensor_parallel_rank

    def get_tensor_model_parallel_group(self) -> ProcessGroup | None:
        """Ranks that share every layer's matrices."""
        return self._topology.tensor_parallel_group

    def get_tensor_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._topology.tensor_parallel_size

    def get_tensor_model_parallel_rank(self) -> int:
        """This one's place among them."""
        return self._topology.tensor_parallel_rank

    def get_pipeline_model_parallel_group(self) -> ProcessGroup | None:
        """Ranks with the stages of one copy of the model."""
        return self._topology.pipeline_parallel_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._topology.pipeline_parallel_size


def register_groups(topology: Topology, unit: ModelParallelUnit, degrees: Sequence[int]) -> None:
    """Give DeepSpeed our groups for these degrees of expert parallelism, in place of those of an earlier engine.

    It looks them up by name in dictionaries, and would make groups of its own for names that it does not find.
    """
    groups.mpu = unit
    groups.expert_tensor_parallel_world_size = topology.tensor_parallel_size if topology.expert_tensor_parallel else 1
    for known, ranks, ours in (
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, topology.expert_parallel_groups),
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, topology.expert_data_groups),
    ):
        known.clear()
        ranks.clear()
        for degree in degrees:
            known[expert_group_name(degree)] = ours[degree]
            ranks[expert_group_name(degree)] = torch.distributed.get_process_group_ranks(ours[degree])


def mark_parameters(module: nn.Module, layouts: Mapping[str, ParamLayout]) -> None:
    """Set the attributes by which DeepSpeed knows how parameters are spread.

    ``allreduce`` and ``group_name``: an expert's gradient is reduced over the expert-data-parallel group of its degree
    alone. ``model_parallel``: the parameter counts in the global gradient norm on every tensor-parallel rank.
    """
    for name, parameter in module.named_parameters():
        layout, marks = layouts[name], {}
        if layout.expert_degree is not None:
            marks |= {"allreduce": False, "group_name": expert_group_name(layout.expert_degree)}
        if layout.model_parallel:
            marks |= {"model_parallel": True, "tensor_model_parallel": True}
        for attribute, value in marks.items():
            setattr(parameter, attribute, value)


def mark_groups(groups: Sequence[dict[str, Any]]) -> None:
    """Set the keys by which DeepSpeed knows which of our parameter groups hold experts."""
    for group in groups:
        if group["expert_degree"] is not None:
            group.update(moe=True, name=expert_group_name(group["expert_degree"]))


@dataclasses.dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose fp32 weights and optimizer states this rank keeps (ZeRO-1).

    ``start`` and ``numel`` address the flattened parameter. ``master`` are the fp32 weights and ``states`` the
    optimizer's states by name: one-dimensional views of ``numel`` elements into the optimizer's own memory.
    """

    start: int
    numel: int
    master: torch.Tensor
    states: Mapping[str, StateSlice]


def allow_smallest_loss_scale(optimizer: Any) -> None:
    """Keep DeepSpeed from raising where fp16's loss scale is at its smallest: the trainer counts skipped updates."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def fragments(module: nn.Module, optimizer: ShardedOptimizer) -> Iterator[tuple[str, nn.Parameter, Fragment | None]]:
    """Each parameter of ``module`` with the fragment of it that this rank keeps (None when it keeps none).

    ZeRO-1 lays the parameters of a group one after another in a flat tensor and gives each rank an equal shard, which
    ``optimizer`` sees as the only parameter of the group.
    """
    for name, parameter in module.named_parameters():
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            yield name, parameter, None
            continue
        shard = optimizer.param_groups[mapping.param_group_index]["params"][0]
        start, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        state = optimizer.state[shard]
        yield (
            name,
            parameter,
            Fragment(
                start=mapping.lp_fragment_address.start,
                numel=numel,
                master=shard.detach().narrow(0, start, numel),
                states={name: state[name].narrow(0, start, numel) for name in optimizer.states},
            ),
        )


def is_tied_replica(parameter: nn.Parameter) -> bool:
    """Whether an earlier pipeline stage has this parameter too; DeepSpeed leaves it out of the gradient norm then."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def accumulated(parameter: nn.Parameter) -> object:
    """``parameter`` as the pipeline reads it to add up tied gradients: its ``grad`` is what it has accumulated.

    With fp16 the accumulator is apart from the gradient of the last micro-batch, and the pipeline does not know it.
    """
    apart = getattr(parameter, "grad_accum", None)
    return parameter if apart is None else types.SimpleNamespace(grad=apart)


def end_backward(engine: Any) -> None:
    """What ``engine`` does after a backward pass of its own: add up gradients, and after the last one reduce them."""
    engine._backward_epilogue()


def call_before_step(optimizer: Any, function: Callable[[], None]) -> None:
    """Call ``function`` in each update of ``optimizer``, when gradients are reduced and still unclipped."""
    step = optimizer.step

    def step_after_function(*args: Any, **kwargs: Any) -> Any:
        function()
        return step(*args, **kwargs)

    optimizer.step = step_after_function


def reduced_gradient_norms(optimizer: Any, tensor_rank: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter with the norm of the part of its gradient that this rank keeps, as a scalar on the device.

    For DeepSpeed's ZeRO-1 optimizer, in what :func:`call_before_step` calls. With fp16 the loss scale has multiplied
    norms. Over all ranks each element counts once, as in the norm of all: what another rank counts is left out.
    """
    for number, parameters in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:  # which has computed them already
            known = optimizer.norm_for_param_grads
            parts = [(p, known.get(optimizer.get_param_id(p))) for p in parameters]
        else:
            gradients = [x for x in optimizer.averaged_gradients[number] if not getattr(x, "_zero_padding", False)]
            parts = list(zip(parameters, gradients, strict=False))  # the last gradient may be padding
        for parameter, part in parts:
            counts = tensor_rank == 0 or getattr(parameter, "model_parallel", False)
            if part is not None and counts and not is_tied_replica(parameter):
                yield parameter, torch.linalg.vector_norm(part, dtype=torch.float32)


def offload_from_where_gradients_are_reduced(optimizer: Any) -> None:
    """With the optimizer's state in CPU memory, let gradients go there from the buffer in which they are reduced.

    DeepSpeed puts one more fp32 buffer for this rank's share of a group between the two. ZeRO-1 has no use for it: it
    reduces once an update. It takes 4 bytes of GPU memory a parameter / replicas, and after an update that was skipped
    its contents, which are not finite, stay and are added to: no further update would be made.
    """
    if getattr(optimizer, "cpu_offload", False):
        optimizer._use_compact_grad_partition_buffer = lambda group: False
