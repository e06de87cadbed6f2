"""The processes of an evaluation: data-parallel, and the experts of a model spread over neighbours."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.inference.load import ModelCheckpoint, choose_device, load_model
from megatron.model.gpt import GPTModel
from megatron.parallel import initialize as start
from megatron.parallel.initialize import Topology
from megatron.parallel.launch import Launch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """``size`` processes, seen from number ``rank``; without a topology it is one alone."""

    rank: int = 0
    size: int = 1
    topology: Topology | None = None
    expert_parallel: int = 1

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, in order of rank, on every process."""
        if self.topology is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.topology.control_group)
        return values

    def from_first(self, value: T) -> T:
        """The ``value`` of process 0."""
        if self.topology is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.topology.control_group)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on some process; all must ask."""
        return flag if self.topology is None else bool(self.topology.agree_max(int(flag)))


def join(device: str | None, expert_parallel: int) -> tuple[Processes, torch.device]:
    """Meet the other processes that torchrun or srun started, if there are any.

    Args:
        device: "cpu", "cuda" or "cuda:N"; the GPU by default. With several processes each takes its own.
        expert_parallel: how many neighbours share the experts.

    Raises:
        ValueError: the processes cannot be cut into such groups, or there is no such device.
    """
    launch = Launch.from_environment()
    if launch.world_size % expert_parallel:
        raise ValueError(
            f"--expert-parallel {expert_parallel} does not divide the {launch.world_size} processes; "
            f"start a multiple: torchrun --nproc-per-node {expert_parallel} ..."
        )
    if launch.world_size == 1:
        return Processes(), choose_device(device)
    config = ParallelConfig(moe_expert_parallel_size=(expert_parallel,))
    chosen = start.choose_device(device, launch.local_rank)
    launch, store = start.rendezvous(launch, config.timeout)
    topology = start.initialize(config, launch, chosen, store)
    return Processes(launch.rank, launch.world_size, topology, expert_parallel), chosen


def load_share(source: ModelCheckpoint, processes: Processes, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """The model in evaluation mode, dropping no token, with this process's share of the experts.

    Raises:
        ValueError: the processes do not divide the experts of a layer.
        CheckpointError: the checkpoint is damaged or lacks a weight.
    """
    if processes.expert_parallel == 1:
        return load_model(source, device, dtype)
    _check_experts(source.config.moe.num_experts, processes.expert_parallel)
    topology = processes.topology
    assert topology is not None  # experts are shared by several processes
    return load_model(source, device, dtype, topology.expert_group, topology.control_group)


def _check_experts(counts: Sequence[int], degree: int) -> None:
    for count in counts:
        if count == 1:
            raise ValueError(f"--expert-parallel {degree} for a model without experts; leave it out")
        if count % degree:
            raise ValueError(f"--expert-parallel {degree} does not divide the {count} experts of a layer")
