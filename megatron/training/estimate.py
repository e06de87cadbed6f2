"""What a run is expected to need and how long it will take, printed at its start."""

import os

import torch

from megatron.config import RunConfig
from megatron.config.errors import ConfigError
from megatron.parallel.initialize import Topology
from megatron.planning.devices import Device, device_of
from megatron.planning.plan import Machine, aligned, make_plan, needs


def estimate(config: RunConfig, topology: Topology, vocab_size: int) -> str:
    """Memory, speed and time of a run on the GPUs that it was started on, in a few lines.

    Without speed and time on a CPU or an unknown GPU.

    Args:
        config: of the run, valid.
        topology: of this process.
        vocab_size: padded.
    """
    device: Device | None = None
    if topology.device.type == "cuda":
        properties = torch.cuda.get_device_properties(topology.device)
        device = device_of(properties.name, properties.total_memory)
    world = topology.launch.world_size
    node = int(os.environ.get("LOCAL_WORLD_SIZE") or max(torch.cuda.device_count(), 1))
    try:
        plan = make_plan(config, Machine(world, min(node, world), device), vocab_size)
    except ConfigError:  # a GPU whose peak in this precision is not known
        plan = make_plan(config, Machine(world, min(node, world)), vocab_size)
    lines = "plan, from what was measured on other runs (tools/plan_run.py):\n" + aligned(needs(plan))
    if not plan.fits:
        lines += "\nwarning: the run may not fit into the GPUs' memory; tools/plan_run.py finds a layout that does"
    return lines
