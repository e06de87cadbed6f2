"""Random initial values that depend on a seed and a name only, not on devices or on how parameters are spread."""

import hashlib

import torch


def named_generator(seed: int, layer: int, name: str) -> torch.Generator:
    """A CPU generator that follows from the run's seed, the layer and a name within it, and from nothing else."""
    digest = hashlib.sha256(f"{seed}/layer {layer}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def fill_normal(x: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill ``x`` with normal(0, std), drawn on the CPU in fp32 so that it is the same on every device."""
    x.copy_(torch.empty(x.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator))
