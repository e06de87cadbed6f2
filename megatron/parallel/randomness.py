"""Random numbers that differ between tensor-parallel processes, beside those that agree.

The trainer seeds torch's default generators alike on all processes of a tensor group, and all of them draw the same
numbers from these. Where each has values of its own (its heads, its piece of the sequence), it draws from a stream of
its own instead, which begins with one number of the common stream: so it is repeated when the common one is, by a
resumed run or by the recomputation of a layer.
"""

import contextlib
import random
from collections.abc import Iterator

import torch

from megatron.parallel.groups import TensorGroup


@contextlib.contextmanager
def own_randomness(group: TensorGroup, device: torch.device) -> Iterator[None]:
    """Inside, ``device``'s default generator gives each process other numbers; afterwards it goes on as if unused."""
    if group.size == 1:
        yield
        return
    common = int(torch.randint(2**62, (), device="cpu"))  # of the CPU's generator: no wait for the GPU
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(random.Random(f"{common}/{group.rank}").getrandbits(63))
    try:
        yield
    finally:
        generator.set_state(state)
