"""Random initial values that depend on a seed and a name only, not on devices or on how parameters are spread."""

import hashlib
import math
from collections.abc import Sequence

import torch

from megatron.parallel.sharding import Shard, global_shape, take


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that follows from the run's seed and a name, and from nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def residual_output_std(std: float, num_layers: int) -> float:
    """Standard deviation of weights that write into the residual stream.

    L layers add 2 L such outputs, so each is scaled by 1/sqrt(2 L) to keep the stream's variance independent of depth
    (Radford et al. 2019, section 2.3).
    """
    return std / math.sqrt(2 * num_layers)


@torch.no_grad()
def fill_normal(x: torch.Tensor, std: float, generator: torch.Generator, shards: Sequence[Shard] = ()) -> None:
    """Fill ``x`` with its piece of normal(0, std) values.

    They are drawn for the whole tensor, on the CPU in fp32, so that they are the same on every device and however the
    tensor is cut.
    """
    values = torch.empty(global_shape(x.shape, shards), dtype=torch.float32, device="cpu")
    x.copy_(take(values.normal_(0.0, std, generator=generator), shards))
