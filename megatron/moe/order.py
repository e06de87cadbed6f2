"""A random order of tokens that follows from one number, the same in plain torch as in the kernels.

It decides which tokens an over-full expert keeps. A run must keep the same ones whether kernels or plain torch route
its tokens, since that depends on the layout.
"""

import torch

ROUNDS = 6


def random_order(count: int, seed: torch.Tensor) -> torch.Tensor:
    """A permutation of 0 ... count - 1, int64: the numbers in the order in which they come.

    A Feistel network is a keyed bijection of the numbers of as many bits as ``count - 1`` has; a number that it takes
    outside goes through it again until it is inside.

    Args:
        seed: int64 scalar, at least 0, on the device of the result.
    """
    bits = max(count - 1, 1).bit_length()
    low, high = (bits + 1) // 2, bits // 2
    order = _shuffle(torch.arange(count, device=seed.device), low, high, seed)
    if count < 1 << bits:  # otherwise all are inside, and the host need not look
        while bool((outside := order >= count).any()):
            order = torch.where(outside, _shuffle(order, low, high, seed), order)
    return order


def _shuffle(i: torch.Tensor, low: int, high: int, seed: torch.Tensor) -> torch.Tensor:
    """The bijection of [0, 2^(low + high)): each round changes one half of a number's bits by a hash of the other."""
    a, b = i >> low, i & ((1 << low) - 1)
    for turn in range(0, ROUNDS, 2):
        a = a ^ (mix(b, (seed >> (4 * turn)) + turn) & ((1 << high) - 1))
        b = b ^ (mix(a, (seed >> (4 * turn + 4)) + turn + 1) & ((1 << low) - 1))
    return (a << low) | b


def mix(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A 32-bit hash of x and key (murmur3's finalizer), in int64."""
    x = (x ^ key) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
