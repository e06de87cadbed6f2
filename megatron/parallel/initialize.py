"""Start torch.distributed and build the process groups of a run."""

import dataclasses
import datetime
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.config.moe import one_for_all_or_each
from megatron.parallel import core_state
from megatron.parallel.grid import Grid
from megatron.parallel.groups import ExpertGroup, NodeGroups, TensorGroup, member_group
from megatron.parallel.launch import Launch
from megatron.parallel.nodes import gather_node_groups


@dataclasses.dataclass(frozen=True)
class Topology:
    """The process groups of this rank.

    Rank = tensor rank + tensor size * (data rank + data size * stage). A layer's experts are spread over consecutive
    data-parallel ranks, as many as its expert-parallel degree; ranks with the same expert-parallel rank hold the same
    experts (:class:`megatron.parallel.grid.Grid`). The tensor and pipeline groups of a single process are None.

    A parameter is replicated over ``data_parallel_group``, and over ``tensor_parallel_group`` too if it is not sharded;
    an expert's parameter over ``expert_data_group(degree)`` only.
    """

    launch: Launch
    device: torch.device
    tensor_parallel_size: int
    tensor_parallel_rank: int
    tensor_parallel_group: dist.ProcessGroup | None
    sequence_parallel: bool
    expert_tensor_parallel: bool
    pipeline_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_group: dist.ProcessGroup | None
    data_parallel_size: int
    data_parallel_rank: int
    data_parallel_group: dist.ProcessGroup
    model_parallel_group: dist.ProcessGroup  # tensor and pipeline: the ranks that hold one copy of the model
    expert_parallel_sizes: tuple[int, ...]  # one for all MoE layers, or one for each
    expert_parallel_groups: Mapping[int, dist.ProcessGroup]  # by degree
    expert_data_groups: Mapping[int, dist.ProcessGroup]  # by degree
    expert_node_groups: Mapping[int, NodeGroups | None]  # by degree
    overlap_chunks: int
    control_group: dist.ProcessGroup  # gloo: flags and file-system agreements, never on the GPU's queue

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and logs for the run."""
        return self.launch.rank == 0

    @property
    def tensor_group(self) -> TensorGroup:
        """The group over which every layer's matrices are sharded."""
        return TensorGroup(
            self.tensor_parallel_size,
            self.tensor_parallel_rank,
            self.tensor_parallel_group,
            self.sequence_parallel,
            self.expert_tensor_parallel,
        )

    def expert_group(self, moe_layer: int) -> ExpertGroup:
        """The group over which the experts of MoE layer number ``moe_layer`` (from 0, of the MoE layers) are spread."""
        degree = one_for_all_or_each(self.expert_parallel_sizes, moe_layer)
        group = self.expert_parallel_groups[degree] if degree > 1 else None
        nodes = self.expert_node_groups.get(degree)
        return ExpertGroup(degree, self.data_parallel_rank % degree, group, nodes, self.overlap_chunks)

    def expert_data_group(self, degree: int) -> dist.ProcessGroup:
        """The ranks that hold the same experts of the layers with this degree of expert parallelism."""
        return self.expert_data_groups[degree]

    def agree_max(self, value: int) -> int:
        """The largest of every rank's ``value``."""
        if self.launch.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control_group)
        return int(tensor)


class NoDevice(ValueError):
    """A process has no GPU; other processes of its node may have one."""


def device_name(device: torch.device) -> str:
    """The name of a GPU, such as "NVIDIA H200"; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def choose_device(requested: str | None, local_rank: int) -> torch.device:
    """The device of this rank: ``cuda:LOCAL_RANK``, or the CPU where there is no GPU or ``cpu`` is asked for.

    With ``NCCL_MULTI_RANK_GPU_ENABLE=1``, which NCCL heeds from 2.30 on, processes share the GPUs if there are too few.
    """
    if requested == "cpu" or (requested is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NoDevice("--device cuda was asked for, but torch finds no GPU; check the driver or use --device cpu")
    count = torch.cuda.device_count()
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return torch.device("cuda", local_rank % count)
    if local_rank >= count:
        raise NoDevice(
            f"process {local_rank} of this node has no GPU of its own: {count} visible; start {count} processes a node"
        )
    return torch.device("cuda", local_rank)


def rendezvous(launch: Launch, timeout: datetime.timedelta) -> tuple[Launch, dist.Store]:
    """Connect to the store that all processes of a run share; also returns the launch with the store's port.

    Args:
        launch: this process's rank and the address; a port of 0 is for a single process, which takes any free one.
        timeout: how long a process waits for a key that another one sets.

    Raises:
        ConnectionError: rank 0 did not start the store in time.
    """
    try:
        if launch.launcher == "torchrun":  # has a store, on any of the nodes, which outlives a restart
            store = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))[0]
            return launch, dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store = dist.TCPStore(
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=launch.rank == 0,
            timeout=timeout,
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        raise ConnectionError(
            f"rank 0 did not come to {launch.master_addr}:{launch.master_port} within {timeout.total_seconds():g} s"
            f" (--distributed-timeout-minutes); start it, and check MASTER_ADDR and MASTER_PORT: {error}"
        ) from None
    return dataclasses.replace(launch, master_port=store.port), store


def initialize(config: ParallelConfig, launch: Launch, device: torch.device, store: dist.Store) -> Topology:
    """Initialize torch.distributed and build the groups. ``config`` must be valid for ``launch.world_size`` ranks."""
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    launch.export()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes the GPU of this number
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=config.timeout
    )
    return build_groups(config, launch, device)


def build_groups(config: ParallelConfig, launch: Launch, device: torch.device) -> Topology:
    """Build each group once; torch.distributed is initialized."""
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    rank, degrees = launch.rank, sorted(set(config.moe_expert_parallel_size))
    grid = Grid(launch.world_size, tensor, pipeline, config.enable_expert_tensor_parallelism)

    def build(kind: str, degree: int = 1) -> dist.ProcessGroup:
        """This rank's group. Every rank creates all groups, in the same order, as torch requires."""
        mine, description = None, f"{kind} {degree}"
        for ranks in grid.groups(kind, degree).tolist():
            group = dist.new_group(ranks, timeout=config.timeout, group_desc=description)
            if rank in ranks:
                mine = group
        return member_group(mine)

    def build_expert_data(degree: int) -> dist.ProcessGroup:
        same = grid.group_of(rank, "expert_data", degree) == grid.group_of(rank, "data")
        return data_group if same else build("expert_data", degree)

    tensor_group, pipeline_group, data_group = build("tensor"), build("pipeline"), build("data")
    model_group = build("model")
    expert_groups = {degree: build("expert", degree) for degree in degrees}
    expert_data_groups = {degree: build_expert_data(degree) for degree in degrees}
    one_degree = len(degrees) == 1
    core_state.register(
        tensor=tensor_group,
        pipeline=pipeline_group,
        data=data_group,
        model=model_group,
        expert=expert_groups[degrees[0]] if one_degree else None,
        expert_data=expert_data_groups[degrees[0]] if one_degree else None,
    )
    control_group = member_group(dist.new_group(backend="gloo", timeout=config.timeout))
    node_groups = {}
    if config.moe_hierarchical_all_to_all:
        for degree in (degree for degree in degrees if degree > 1):
            ranks = grid.group_of(rank, "expert", degree)
            node_groups[degree] = gather_node_groups(ranks, launch.node, control_group, config.timeout)
    return Topology(
        launch=launch,
        device=device,
        tensor_parallel_size=tensor,
        tensor_parallel_rank=rank % tensor,
        tensor_parallel_group=tensor_group if tensor > 1 else None,
        sequence_parallel=config.sequence_parallel,
        expert_tensor_parallel=config.enable_expert_tensor_parallelism,
        pipeline_parallel_size=pipeline,
        pipeline_parallel_rank=rank // (tensor * grid.data),
        pipeline_parallel_group=pipeline_group if pipeline > 1 else None,
        data_parallel_size=grid.data,
        data_parallel_rank=rank // tensor % grid.data,
        data_parallel_group=data_group,
        model_parallel_group=model_group,
        expert_parallel_sizes=config.moe_expert_parallel_size,
        expert_parallel_groups=expert_groups,
        expert_data_groups=expert_data_groups,
        expert_node_groups=node_groups,
        overlap_chunks=config.moe_overlap_chunks,
        control_group=control_group,
    )


def forget_groups() -> None:
    """Drop the groups of :func:`build_groups`, so that others can be built in this process."""
    core_state.forget()


def shut_down() -> None:
    """Leave the process groups, so that the process ends without a warning."""
    if dist.is_initialized():
        forget_groups()
        dist.destroy_process_group()
