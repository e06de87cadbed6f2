"""Updates in CPU memory: how many cores a process uses for them."""

import os

import torch


def use_cores(world_size: int) -> int:
    """Let torch use this process's share of the machine's cores, unless OMP_NUM_THREADS names a number above 1.

    torchrun sets that variable to 1 where nobody did, with which an update in CPU memory uses one core. The cores that
    the process may run on are shared by as many processes as there are GPUs to be seen, or fewer if the run is smaller.

    Returns:
        The number of threads.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        neighbours = max(1, min(world_size, torch.cuda.device_count()))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    return torch.get_num_threads()


def threads_in_words() -> str:
    """A line for the log."""
    return (
        f"the optimizer's state is in CPU memory; each process updates it with {torch.get_num_threads()} threads"
        " (OMP_NUM_THREADS sets another number)"
    )
