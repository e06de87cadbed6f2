"""Start torch.distributed and build the process groups of a run."""

import dataclasses
import datetime
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.parallel.groups import ExpertGroup, TensorGroup
from megatron.parallel.launch import Launch


@dataclasses.dataclass(frozen=True)
class Topology:
    """The process groups of this rank.

    Rank = tensor rank + tensor size * (data rank + data size * stage). Among the data-parallel ranks,
    ``expert_parallel_size`` neighbours share the experts between them; ranks at the same place of such groups hold the
    same experts (expert-data-parallel). Groups of one process are None, but for ``data_parallel_group``.
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
    expert_parallel_size: int
    expert_parallel_rank: int
    expert_parallel_group: dist.ProcessGroup | None
    control_group: dist.ProcessGroup  # gloo: flags and file-system agreements, never on the GPU's queue

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.launch.rank == 0

    @property
    def tensor_group(self) -> TensorGroup:
        """The group that shares every layer's matrices."""
        return TensorGroup(
            self.tensor_parallel_size,
            self.tensor_parallel_rank,
            self.tensor_parallel_group,
            self.sequence_parallel,
            self.expert_tensor_parallel,
        )

    def expert_group(self, num_experts: int) -> ExpertGroup:
        """The group over which a layer of ``num_experts`` experts is spread."""
        if num_experts % self.expert_parallel_size:
            raise ValueError(
                f"{num_experts} experts cannot be spread evenly over {self.expert_parallel_size} processes"
            )
        return ExpertGroup(self.expert_parallel_size, self.expert_parallel_rank, self.expert_parallel_group)

    def agree_max(self, value: int) -> int:
        """The largest of every rank's ``value``."""
        if self.launch.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control_group)
        return int(tensor)


def choose_device(requested: str | None, local_rank: int) -> torch.device:
    """The device of this rank: ``cuda:LOCAL_RANK``, or the CPU where there is no GPU or ``cpu`` is asked for."""
    if requested == "cpu" or (requested is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no GPU; check the driver or use --device cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this node has no GPU of its own: {count} visible; start {count} processes a node"
        )
    return torch.device("cuda", local_rank)


def meet(launch: Launch, timeout: datetime.timedelta) -> tuple[Launch, dist.Store]:
    """The store through which all processes of a run find each other, and the launch with its port.

    Args:
        launch: this process among all; a port of 0 is for a single process, which takes any free one.
        timeout: how long a process waits for what another one has to tell.
    """
    if launch.starter == "torchrun":  # has a store, on whichever node leads
        return launch, next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))[0]
    store = dist.TCPStore(
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )
    return dataclasses.replace(launch, master_port=store.port), store


def initialize(config: ParallelConfig, launch: Launch, device: torch.device, store: dist.Store) -> Topology:
    """Join all processes and build the groups. ``config`` must have been validated for ``launch.world_size``."""
    backend = config.distributed_backend or ("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    launch.export()
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=config.timeout
    )
    return build_groups(config, launch, device)


def build_groups(config: ParallelConfig, launch: Launch, device: torch.device) -> Topology:
    """Build the groups of processes that have met already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.moe_expert_parallel_size,
        # so that expert-parallel groups join ranks of one tensor-parallel rank, as DeepSpeed's do
        expert_tensor_parallel_size=config.tensor_model_parallel_size,
        distributed_timeout_minutes=max(1, int(config.distributed_timeout_minutes)),
        create_gloo_process_groups=False,
    )

    def group(size: int, get: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup | None:
        return get() if size > 1 else None

    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    expert = config.moe_expert_parallel_size
    return Topology(
        launch=launch,
        device=device,
        tensor_parallel_size=tensor,
        sequence_parallel=config.sequence_parallel,
        expert_tensor_parallel=config.enable_expert_tensor_parallelism,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_group=group(tensor, parallel_state.get_tensor_model_parallel_group),
        pipeline_parallel_size=pipeline,
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_group=group(pipeline, parallel_state.get_pipeline_model_parallel_group),
        data_parallel_size=launch.world_size // (tensor * pipeline),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_group=parallel_state.get_data_parallel_group(),
        model_parallel_group=parallel_state.get_model_parallel_group(),
        expert_parallel_size=expert,
        expert_parallel_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_parallel_group=group(expert, parallel_state.get_expert_model_parallel_group),
        control_group=dist.new_group(backend="gloo", timeout=config.timeout),
    )


def forget_groups() -> None:
    """Drop the groups of :func:`build_groups`, so that others can be built in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def shut_down() -> None:
    """Leave the process groups, so that the process ends without a warning."""
    if dist.is_initialized():
        forget_groups()
        dist.destroy_process_group()
