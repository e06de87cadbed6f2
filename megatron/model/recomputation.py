"""Layers that draw random numbers, run once, or again in the backward pass instead of keeping their activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run_seeded(layer: Callable[[torch.Tensor], Any], x: torch.Tensor, seed: Callable[[], None], recompute: bool) -> Any:
    """``layer(x)``, after ``seed()`` has seeded what it draws from.

    With ``recompute`` only ``x`` is kept for the backward pass, which seeds and runs the layer again as far as it needs
    to: the last all-to-all of expert outputs is not repeated. Seeding is quicker than keeping generators' states.
    """

    def run(x: torch.Tensor) -> Any:
        seed()
        return layer(x)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if recompute else run(x)
