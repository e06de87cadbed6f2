"""Upcycling: a dense model becomes one with experts that computes the same (Komatsuzaki et al. 2022, arXiv 2212.05055).

Each expert of a layer starts as a copy of the layer's feed-forward d(x) = gelu(x W1 + b1) W2 + b2. What the layer
computes is then d(x) again, if the gates are undone:

* top-k with k > 1: the gates of a token's experts add up to 1, so nothing is to be done.
* top-1: the output is multiplied by the gate, the softmax probability itself. The router's weights start as
  normal(0, s^2) with s = 1e-7 / sqrt(H). Its input is a layer norm's output, so logits are of the size 1e-7 and every
  gate is 1/E to that relative precision, yet the largest logit, which decides, is any expert's. W2 and b2 are
  multiplied by E.
* residual: y = experts(x) c_0 + mlp(x) c_1 with c = softmax(coefficient(x)). The coefficient starts at 0, so c_0 and
  c_1 are 1/2, and both parts start as copies of d.

The optimizer's state is carried over by the chain rule. Where a weight w is replaced by a w, and its output is
multiplied by c, the gradient is that of the dense weight times c, for W2 and b2 of experts c_0 / E; so exp_avg is
multiplied by that and exp_avg_sq by its square. (That an expert sees a part of the tokens only is not in it.) New
parameters have states of 0, and balancers start as in a new run.

Shapes: E experts, H hidden, F FFN hidden.
"""

import dataclasses
import math

import torch

from megatron.checkpoint.errors import CheckpointError
from megatron.config import MoEConfig, ParallelConfig
from megatron.config.run import to_dict
from megatron.conversion.changes import check_model
from megatron.conversion.contents import MODEL, Contents, Lazy, buffer_shapes, initial_buffer, parameter_shapes
from megatron.moe.initialization import named_generator

LOGIT_SIZE = 1e-7
_DENSE = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


def upcycle(contents: Contents, moe: MoEConfig, noise: float = 0.0, seed: int = 0) -> Contents:
    """A dense model with experts in place of some feed-forwards. Clock, tokenizer and all else stay.

    Args:
        contents: the dense checkpoint, with or without optimizer state.
        moe: which layers get experts, how many, and how tokens are routed.
        noise: standard deviation of normal noise on the matrices of experts, as a fraction of the standard deviation
            of the dense matrix; with it the result no longer computes quite the same.
        seed: of the router's weights and of the noise.

    Raises:
        CheckpointError: the checkpoint has experts already.
        ValueError: the options do not fit the model.
    """
    config = contents.config
    if config.moe.enabled:
        raise CheckpointError(f"{contents.where} has experts already; --upcycle takes the checkpoint of a dense model")
    if not moe.enabled:
        raise ValueError("--upcycle needs --num-experts of 2 or more")
    if not 0 <= noise < math.inf:
        raise ValueError(f"--upcycle-noise {noise}: use 0 or more, such as 0.01")
    check_model(config.model, moe, ParallelConfig())
    described = to_dict(dataclasses.replace(config, moe=moe))
    tensors = {}
    powers = {f"{state}.": power for state, power in contents.states.items()} if contents.has_optimizer else {}
    for prefix, power in ({MODEL: 0} | powers).items():
        for name, shape in parameter_shapes(config.model, moe, contents.meta["vocab_size"]).items():
            tensors[prefix + name] = _tensor(contents, moe, prefix, power, name, shape, noise, seed)
    for name, shape in buffer_shapes(config.model, moe, contents.meta["vocab_size"]).items():
        tensors[MODEL + name] = initial_buffer(name, shape, moe)
    origin = {"format": "upcycled", "folder": contents.where, "noise": noise, "seed": seed}
    return dataclasses.replace(
        contents, tensors=tensors, meta=contents.meta | {"config": described, "origin": origin}
    ).check()


def _tensor(
    contents: Contents,
    moe: MoEConfig,
    prefix: str,
    power: int,
    name: str,
    shape: tuple[int, ...],
    noise: float,
    seed: int,
) -> Lazy:
    dense = contents.tensors
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "layers" else -1
    if layer < 0 or parts[2] != "mlp" or not moe.is_moe_layer(layer):
        return dense[prefix + name]
    before = f"{prefix}layers.{layer}.mlp."
    residual = moe.mlp_type == "residual"
    share = 0.5 if residual else 1.0  # c_0, c_1
    if parts[3] == "mlp":
        return _scaled(dense[before + ".".join(parts[4:])], _factor(power, 1.0, share))
    if parts[3] == "experts":
        kind = parts[4]
        source = dense[before + _DENSE[kind]]
        scale = float(shape[0]) if moe.topk == 1 and kind in ("w2", "b2") else 1.0
        sigma = noise if prefix == MODEL and kind in ("w1", "w2") else 0.0
        return _copies(source, shape, _factor(power, scale, share), sigma, seed, layer, kind)
    first = next(iter(dense.values())).dtype if prefix == MODEL else torch.float32
    std = LOGIT_SIZE / math.sqrt(shape[-1]) if parts[3] == "router" and prefix == MODEL else 0.0
    return _new(shape, first, std, seed, layer)


def _factor(power: int, scale: float, share: float) -> float:
    """What a dense weight (``power`` 0), or an average of its gradient to a ``power``, is multiplied by when the weight
    is multiplied by ``scale`` and its output by 1 / scale and ``share``."""
    return (share / scale) ** power if power else scale


def _scaled(source: Lazy, factor: float) -> Lazy:
    return source if factor == 1.0 else source.map(lambda tensor: tensor * factor)


def _copies(
    source: Lazy, shape: tuple[int, ...], factor: float, noise: float, seed: int, layer: int, kind: str
) -> Lazy:
    """[E, ...] of one dense tensor, whose matrices are output-first where those of experts are input-first."""

    def one(row: int) -> torch.Tensor:
        tensor = source.read(None)
        tensor = (tensor.T if tensor.dim() == 2 else tensor) * factor
        if noise:
            generator = named_generator(seed, f"layer {layer}/upcycled {row} {kind}")
            drawn = torch.empty(tensor.shape).normal_(generator=generator)
            tensor = tensor + (noise * tensor.float().std() * drawn).to(tensor.dtype)
        return tensor.contiguous()

    def read(row: int | None) -> torch.Tensor:
        return torch.stack([one(expert) for expert in range(shape[0])]) if row is None else one(row)

    return Lazy(shape, source.dtype, read)


def _new(shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int, layer: int) -> Lazy:
    def read(row: int | None) -> torch.Tensor:
        tensor = torch.zeros(shape)
        if std:
            tensor.normal_(0.0, std, generator=named_generator(seed, f"layer {layer}/upcycled router"))
        return tensor.to(dtype) if row is None else tensor[row].to(dtype)

    return Lazy(shape, dtype, read)
