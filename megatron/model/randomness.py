"""What a layer draws at random depends on the micro-batch and the layer's number, not on who ran before it."""

import random

import torch


def seed_layer(seed: int, layer: int) -> None:
    """Seed torch's default generators for layer ``layer`` of a forward pass that is seeded with ``seed``.

    Dropout masks, routing noise and random token selection of a layer are then the same on whichever pipeline stage it
    runs. Call it outside of activation checkpointing, which keeps the generator's state for the second run.
    """
    torch.manual_seed(layer_seed(seed, layer))


def layer_seed(seed: int, layer: int) -> int:
    """The seed of layer ``layer`` of a forward pass that is seeded with ``seed``."""
    return random.Random(f"{seed}/{layer}").getrandbits(63)
