"""Random initial values that depend on a seed and a name only, not on devices or on how parameters are spread."""

import hashlib
from collections.abc import Sequence

import torch

from megatron.parallel.sharding import Shard, global_shape, take


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that follows from the run's seed and a name, and from nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def fill_normal(x: torch.Tensor, std: float, generator: torch.Generator, shards: Sequence[Shard] = ()) -> None:
    """Fill ``x`` with its piece of normal(0, std) values.

    They are drawn for the whole tensor, on the CPU in fp32, so that they are the same on every device and however the
    tensor is cut.
    """
    values = torch.empty(global_shape(x.shape, shards), dtype=torch.float32, device="cpu")
    x.copy_(take(values.normal_(0.0, std, generator=generator), shards))
