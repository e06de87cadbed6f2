"""Everything we use of DeepSpeed that is not its documented interface, in one place.

Two more things stand elsewhere: ``pipeline_module.py`` overrides ``PipelineModule._partition_layers`` and ``forward``
and ``TiedLayerSpec.build``, and reads ``_num_layers``; ``update.py`` takes over from ``BF16_Optimizer``. The number of
micro-batches changes by the documented ``set_train_batch_size``.

Written for the DeepSpeed version pinned in setup.py. ``tests/engine/test_deepspeed_internals.py`` fails when an upgrade
changes any of it.
"""

import dataclasses
import logging
import math
import types
import warnings
from collections.abc import Iterator, Sequence

import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.utils import groups, logger
from torch import nn
from torch.distributed import ProcessGroup

from megatron.config import RunConfig
from megatron.engine.eight_bit import AdamW8bit, Stretch
from megatron.parallel.initialize import Topology
from megatron.parallel.sharding import shards_of

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
    if AdamW8bit not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:  # else it warns of an optimizer it has not tested
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(AdamW8bit)
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
            for parameter in (self.weight, self.bias):
                parameter.is_expert, parameter.expert_parallel_size = True, degree
        self.num_experts = num_experts
        self.num_local_experts = num_experts // degree
        self.ep_size = degree
        self.expert_group_name = expert_group_name(degree)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to do: the groups exist already."""


def mark_experts(config: RunConfig, model: nn.Module) -> nn.ModuleList:
    """A marker for each degree of expert parallelism in the run, whatever part of its model ``model`` is."""
    here = {p.expert_parallel_size for p in model.parameters() if getattr(p, "is_expert", False)}
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


def mark_model_parallel(module: nn.Module) -> None:
    """Tell DeepSpeed which parameters differ between tensor-parallel ranks; others count once in the global norm.

    Experts count on every rank: either each holds a shard, or ZeRO-1 keeps another piece of their gradient on each.
    """
    for parameter in module.parameters():
        if shards_of(parameter) or getattr(parameter, "is_expert", False):
            parameter.tensor_model_parallel = parameter.model_parallel = True


def mark_expert(parameter: nn.Parameter) -> None:
    """Mark a parameter as an expert's: reduced over the expert-data-parallel group of its degree alone."""
    parameter.allreduce = False
    parameter.group_name = expert_group_name(parameter.expert_parallel_size)


def split_expert_groups(param_groups: list[dict]) -> list[dict]:
    """Split optimizer groups so that none holds experts and other parameters, or experts of two degrees, together.

    Gradients and norms are reduced group by group, so all processes need the same groups in the same order: those
    without experts, then by degree. DeepSpeed alone would order degrees as a set of names, differently in each process,
    and cut large groups, into more of them on a pipeline stage with more experts.
    """
    split = split_params_into_different_moe_groups_for_optimizer(param_groups, max_group_size=math.inf)
    return sorted(split, key=lambda group: int(group["name"].rpartition("_")[2]) if group.get("moe") else 0)


@dataclasses.dataclass(frozen=True)
class Fragment:
    """The stretch of one parameter whose fp32 weights and Adam moments this rank keeps (ZeRO-1).

    ``start`` and ``numel`` address the flattened parameter; the tensors are one-dimensional views of ``numel`` elements
    into the optimizer's own memory. Moments of 8 bits are :class:`megatron.engine.eight_bit.Stretch` instead.
    """

    start: int
    numel: int
    master: torch.Tensor
    exp_avg: torch.Tensor | Stretch
    exp_avg_sq: torch.Tensor | Stretch


def let_loss_scale_rest(optimizer: object) -> None:
    """At its smallest value let fp16's loss scale stay there instead of raising: the trainer counts skipped updates."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def create_adam_state(adam: torch.optim.AdamW, exp_avg_dtype: torch.dtype, exp_avg_sq_dtype: torch.dtype) -> None:
    """Make the moments now instead of at the first step, so that a checkpoint can be loaded into them."""
    for group in adam.param_groups:
        for flat in group["params"]:
            state = adam.state[flat]
            if group.get("eight_bit"):
                state.update(adam.new_state(flat, group))
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state["exp_avg"] = torch.zeros_like(flat, dtype=exp_avg_dtype)
                state["exp_avg_sq"] = torch.zeros_like(flat, dtype=exp_avg_sq_dtype)


def fragments(module: nn.Module, adam: torch.optim.AdamW) -> Iterator[tuple[str, nn.Parameter, Fragment | None]]:
    """Each parameter of ``module`` with the fragment of it that this rank keeps (None when it keeps none).

    ZeRO-1 lays the parameters of an optimizer group one after another in a flat tensor and gives each rank an equal
    piece; what ``adam`` sees as the only parameter of the group is that piece.
    """
    for name, parameter in module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is None:
            yield name, parameter, None
            continue
        flat = adam.param_groups[mapping.param_group_index]["params"][0]
        start, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        state = adam.state[flat]
        yield (
            name,
            parameter,
            Fragment(
                start=mapping.lp_fragment_address.start,
                numel=numel,
                master=flat.detach().narrow(0, start, numel),
                exp_avg=state["exp_avg"].narrow(0, start, numel),
                exp_avg_sq=state["exp_avg_sq"].narrow(0, start, numel),
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


def end_backward(engine: object) -> None:
    """What ``engine`` does after a backward pass of its own: add up gradients, and after the last one reduce them."""
    engine._backward_epilogue()


def offload_from_where_gradients_are_reduced(optimizer: object) -> None:
    """With the optimizer's state in CPU memory, let gradients go there from the buffer in which they are reduced.

    DeepSpeed puts one more fp32 buffer for this rank's share of a group between the two. ZeRO-1 has no use for it: it
    reduces once an update. It takes 4 bytes of GPU memory a parameter / replicas, and after an update that was skipped
    its contents, which are not finite, stay and are added to: no further update would be made.
    """
    if getattr(optimizer, "cpu_offload", False):
        optimizer._use_compact_grad_partition_buffer = lambda group: False
