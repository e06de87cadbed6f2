"""A dense model becomes one with experts that computes the same at first.

Each expert is a copy of the dense feed-forward f. What an MoE layer then gives depends on the gates
(docs/checkpoints.md):

* With K > 1 choices the gates of a token sum to 1, so copies give f(x) exactly, whatever the router says.
* With K = 1 the gate is the softmax probability p. The router starts with weights so small that p = 1/E but for about a
  thousandth, and the experts' output weights and biases are multiplied by E: p * E * f(x) = f(x).
* The residual form adds the dense feed-forward: with its coefficients at zero, c = (1/2, 1/2), so
  1/2 experts(x) + 1/2 f(x) = f(x).

Letters: E experts, K experts of each token.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.checkpoint.formats.contents import MODEL, Contents, Lazy, parameter_shapes
from megatron.config import MoEConfig
from megatron.config.flags import to_dict
from megatron.moe.initialization import named_generator

ROUTER_STD = 1e-3  # of the logits, in top-1, for inputs of unit variance
_PARTS = {"w1": ("fc1.weight", True), "b1": ("fc1.bias", False), "w2": ("fc2.weight", True), "b2": ("fc2.bias", False)}


def upcycle(contents: Contents, moe: MoEConfig, noise: float = 0.0, seed: int = 1234) -> Contents:
    """The dense model with experts in the layers that ``moe`` says; without optimizer state, at 0 tokens.

    Args:
        contents: a dense model, weights alone.
        moe: the experts.
        noise: added to each expert's matrices, as a multiple of their standard deviation, so that experts differ.
        seed: of the noise and of the router.

    Raises:
        CheckpointError: the model has experts already, or ``moe`` has none or too few.
    """
    old = contents.config
    if old.moe.enabled:
        raise CheckpointError(f"{contents.where} has experts already; --upcycle makes them from a dense model")
    if contents.has_optimizer:
        raise CheckpointError(
            f"{contents.where} has optimizer state, which experts cannot take over; add --drop-optimizer"
        )
    counts = [moe.experts_of_layer(layer) for layer in range(old.model.num_layers)]
    if max(counts) < 2:
        raise CheckpointError(f"--num-experts {moe.num_experts} gives no layer experts; give a number above 1")
    if moe.topk > min(count for count in counts if count > 1):
        raise CheckpointError(f"--topk {moe.topk} of {min(c for c in counts if c > 1)} experts; choose fewer")
    new = dataclasses.replace(old, moe=moe)
    shapes = parameter_shapes(new.model, moe, contents.meta["vocab_size"])
    tensors = {MODEL + name: _new(name, shape, contents, moe, counts, noise, seed) for name, shape in shapes.items()}
    clock = contents.meta["clock"] | {"samples": 0, "steps": 0, "skipped": 0}
    origin = {"format": "upcycled", "folder": contents.where, "expert_noise": noise, "seed": seed}
    meta = contents.meta | {"config": to_dict(new), "clock": clock, "optimizer": None, "origin": origin}
    return dataclasses.replace(contents, tensors=tensors, meta=meta, step=0)


def _new(
    name: str, shape: tuple[int, ...], contents: Contents, moe: MoEConfig, counts: list[int], noise: float, seed: int
) -> Lazy:
    """One tensor of the new model."""
    if MODEL + name in contents.tensors:
        return contents.tensors[MODEL + name]
    _, layer, inside = name.split(".", 2)
    feed_forward = f"{MODEL}layers.{layer}.mlp."
    dtype = contents.tensors[feed_forward + "fc1.weight"].dtype
    if inside.startswith("mlp.mlp."):
        return contents.tensors[feed_forward + inside.removeprefix("mlp.mlp.")]
    if inside.startswith("mlp.coefficient."):
        return _made(shape, dtype, lambda: torch.zeros(shape))
    if inside == "mlp.router.weight":
        std = ROUTER_STD / math.sqrt(shape[1]) if moe.topk == 1 else contents.config.model.init_method_std

        def router() -> torch.Tensor:
            return torch.empty(shape).normal_(0, std, generator=named_generator(seed, int(layer), "router"))

        return _made(shape, dtype, router)
    kind = inside.removeprefix("mlp.experts.")
    part, transposed = _PARTS[kind]
    source = contents.tensors[feed_forward + part]
    scale = counts[int(layer)] if moe.topk == 1 and kind in ("w2", "b2") else 1

    def read(row: int | None) -> torch.Tensor:
        if row is None:
            return torch.stack([read(i) for i in range(shape[0])])
        tensor = source.read(None)
        tensor = (tensor.T if transposed else tensor) * scale
        if noise and kind in ("w1", "w2"):
            generator = named_generator(seed, int(layer), f"expert {row} {kind}")
            drawn = torch.empty(tensor.shape).normal_(0, 1, generator=generator)
            tensor = (tensor.float() + drawn * noise * tensor.float().std()).to(dtype)
        return tensor

    return Lazy(shape, dtype, read)


def _made(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], torch.Tensor]) -> Lazy:
    def read(row: int | None) -> torch.Tensor:
        tensor = make().to(dtype)
        return tensor if row is None else tensor[row]

    return Lazy(shape, dtype, read)
