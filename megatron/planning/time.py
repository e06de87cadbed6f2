"""How long a run will take: computation at measured efficiencies, and bytes at given bandwidths.

Measured are steps of one GPU (:mod:`megatron.planning.measured`). On another kind of GPU they are scaled by both peaks.
Where the host needs longer to launch a micro-batch's kernels than the GPU to run them and to exchange what they need,
the GPU waits for it.
What several GPUs send is counted (:mod:`megatron.planning.communication`) and divided by a bandwidth; no part of
it is taken to overlap with computation. So for one H200 the result is close to a measurement, for other layouts it is
an estimate whose parts are shown.
"""

import dataclasses
import functools
from collections.abc import Mapping

from megatron.config import RunConfig
from megatron.config.errors import ConfigError
from megatron.engine.optim import OPTIMIZERS
from megatron.planning import measured
from megatron.planning.activations import rows_of_experts
from megatron.planning.communication import Traffic, communication
from megatron.planning.devices import Device, find_device
from megatron.planning.flops import (
    expert_flops_per_token,
    head_flops_per_token,
    layer_flops_per_token,
    model_flops_per_token,
)
from megatron.planning.parameters import parameters_of_stage
from megatron.planning.placement import place_layers

UPDATE_BYTES = 30  # AdamW of a weight: gradient, fp32 weight and two moments in, those and the bf16 weight out
SUM_BYTES = 10  # a bf16 gradient added to its fp32 sum

PARTS = {
    "dense": "matrix products, attention and all between them",
    "experts": "the experts' matrix products and what is lost around them",
    "dropout": "of attention and hidden states",
    "recomputation": "of activations",
    "host": "what the GPU waits for its launches, without --cuda-graphs",
    "update": "gradient sums and AdamW",
    "gradients": "and new weights, over data-parallel ranks",
    "all-to-all": "tokens to their experts and back",
    "tensor": "activations over tensor-parallel ranks",
    "pipeline": "activations between stages, and stages that wait",
}


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Expected seconds of one update of the full global batch, by :data:`PARTS`, and what that means for the run."""

    parts: Mapping[str, float]
    tokens: int  # of an update
    train_tokens: int
    world: int
    model_flops: int  # a token
    traffic: Mapping[str, Traffic]

    @property
    def seconds(self) -> float:
        """Of one update."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of a GPU."""
        return self.tokens_per_second * self.model_flops / self.world / 1e12

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.train_tokens / self.tokens_per_second / 86400

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.world


def expected_step(config: RunConfig, world: int, vocab_size: int, device: Device, node: int = 8) -> StepEstimate:
    """What an update of the full global batch is expected to take.

    Args:
        config: of a run; it must fit ``world`` ranks.
        vocab_size: padded.
        device: the GPU.
        node: GPUs of a node.

    Raises:
        ConfigError: the device's peak is not known for the run's precision.
    """
    parallel, training, model = config.parallel, config.training, config.model
    replicas = parallel.data_parallel_size(world)
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    traffic = communication(config, world, vocab_size, node)
    sent = {name: _seconds(volume, device) for name, volume in traffic.items()}
    inside = (sent["all-to-all"] + sent["tensor"]) / micro_batches  # of a micro-batch's passes: the GPU works then, too
    layers, first = place_layers(config, vocab_size).layers, 0
    stages = []
    for stage, count in enumerate(layers):
        here = range(first, first + count)
        work = _compute(config, here, vocab_size, device, last=stage == len(layers) - 1)
        stages.append(work | {"host": max(0.0, _launches(config, here) - sum(work.values()) - inside)})
        first += count
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    parts = {name: seconds * micro_batches for name, seconds in slowest.items()}
    idle = sum(slowest.values()) * (len(layers) - 1)
    parts["update"] = _update(config, range(layers[0]), vocab_size, micro_batches, replicas, device)
    parts["gradients"] = sent["dense"] + sent["experts"]
    parts["all-to-all"], parts["tensor"] = sent["all-to-all"], sent["tensor"]
    parts["pipeline"] = sent["pipeline"] + idle
    return StepEstimate(
        {name: parts[name] for name in PARTS},
        tokens=training.global_batch_size * model.seq_length,
        train_tokens=training.train_tokens or 0,
        world=world,
        model_flops=model_flops_per_token(model, config.moe, vocab_size),
        traffic=traffic,
    )


def flops_per_second(config: RunConfig, device: Device) -> float:
    """FLOP/s that a dense step reaches: as measured at this hidden size, at the nearest ones where it was not.

    Raises:
        ConfigError: the device's peak is not known for the run's precision.
    """
    peak = _peak_flops(device, config.optimizer.precision)
    reached = measured.between(_dense_rates(), config.model.hidden_size)
    return reached * peak / _peak_flops(find_device(measured.DEVICE), "bf16")


def _peak_flops(device: Device, precision: str) -> float:
    peak = device.peak_flops(precision)
    if peak is None:
        raise ConfigError(f"the peak of {device.name} in {precision} is not known; plan for another GPU or precision")
    return peak


@functools.cache
def _dense_rates() -> dict[int, float]:
    """FLOP/s of the measured dense steps without their updates, by hidden size."""
    rates, device = {}, find_device(measured.DEVICE)
    for name, milliseconds in measured.STEPS.items():
        run = measured.run_of(name)
        if not run.moe.enabled:
            update = _update(run, range(run.model.num_layers), measured.VOCAB, 1, 1, device)
            tokens = run.training.global_batch_size * run.model.seq_length
            flops = tokens * model_flops_per_token(run.model, run.moe, measured.VOCAB)
            rates[run.model.hidden_size] = flops / (milliseconds / 1e3 - update)
    return rates


def _compute(config: RunConfig, layers: range, vocab_size: int, device: Device, *, last: bool) -> dict[str, float]:
    """Seconds in which a stage computes one micro-batch, forward and backward."""
    model, moe, tensor = config.model, config.moe, config.parallel.tensor_model_parallel_size
    recompute = config.training.checkpoint_activations
    rate = flops_per_second(config, device)
    of_token = config.training.micro_batch_size * model.seq_length / tensor / rate
    dense = experts = 0.0
    for layer in layers:
        flops = layer_flops_per_token(model, moe, layer, model.seq_length)
        if of_experts := expert_flops_per_token(model, moe, layer):
            flops -= of_experts
            experts += of_experts * of_token * _slots(config, layer) / _of_dense(config, layer)
        dense += flops * of_token
    head = head_flops_per_token(model, vocab_size) * of_token if last else 0.0
    return {
        "dense": 3 * (dense + head),
        "experts": 3 * experts,
        "dropout": len(layers) * _dropout(config, device),
        "recomputation": dense + experts if recompute else 0.0,
    }


def _launches(config: RunConfig, layers: range) -> float:
    """Seconds that the host needs to launch a micro-batch's kernels in a stage; next to none for a graph."""
    if config.training.cuda_graphs:
        return 0.0
    of_layer = measured.HOST_MS[config.training.checkpoint_activations]
    return sum(of_layer[config.moe.experts_of_layer(layer) > 1] for layer in layers) / 1e3


def _dropout(config: RunConfig, device: Device) -> float:
    """Seconds that dropout adds to a layer for one micro-batch, forward and backward, recomputation included."""
    model, training, tensor = config.model, config.training, config.parallel.tensor_model_parallel_size
    tokens, forward_passes = training.micro_batch_size * model.seq_length, 1 + training.checkpoint_activations
    seconds = 0.0
    if model.attention_dropout > 0:
        pairs = tokens * model.seq_length / 2 * model.num_attention_heads / tensor
        forward, backward = measured.DROPOUT_OF_ATTENTION
        seconds += pairs * (forward_passes * forward + backward)
    if model.hidden_dropout > 0:
        elements = tokens * model.hidden_size / (tensor if config.parallel.sequence_parallel else 1)
        seconds += 2 * elements * (forward_passes + 1) * measured.DROPOUT_OF_HIDDEN
    numbers = 2 if config.optimizer.precision == "fp32" else 1  # no products, but twice the bytes
    return numbers * seconds * _peak_flops(find_device(measured.DEVICE), "fp16") / _peak_flops(device, "fp16")


def _slots(config: RunConfig, layer: int) -> float:
    """Rows that experts compute for each choice of a token: slots are computed, full or not."""
    parallel = config.parallel
    share = 1 if parallel.enable_expert_tensor_parallelism else parallel.tensor_model_parallel_size
    rows, choices = rows_of_experts(config, layer)
    return rows * share / choices if config.moe.moe_token_dropping else 1.0


def _of_dense(config: RunConfig, layer: int) -> float:
    """Speed of an MoE layer's feed-forward as a part of that of the dense one; exchanges are counted apart."""
    degree, experts = config.expert_parallel_degree(layer), config.moe.experts_of_layer(layer)
    rows = rows_of_experts(config, layer)[0] / experts * degree
    table = measured.EXPERTS_OF_DENSE if config.moe.moe_token_dropping else measured.DROPLESS_OF_DENSE
    return measured.between(table, rows)


def _update(
    config: RunConfig, layers: range, vocab_size: int, micro_batches: int, replicas: int, device: Device
) -> float:
    """Seconds of gradient sums and AdamW on the first stage."""
    held = parameters_of_stage(
        config, vocab_size, layers, first=True, last=config.parallel.pipeline_model_parallel_size == 1
    )
    share = 1 if config.parallel.enable_expert_tensor_parallelism else config.parallel.tensor_model_parallel_size
    pieces = held.dense / replicas + sum(n / (replicas // degree * share) for degree, n in held.experts.items())
    sums = 0 if _no_sums(config, replicas, micro_batches) else held.total * SUM_BYTES * micro_batches
    if config.optimizer.optimizer_cpu_offload:
        more = pieces * measured.UPDATE_ON_HOST
    else:
        more = pieces * measured.UPDATE_OF_OPTIMIZER.get(config.optimizer.optimizer_name, 0.0)
        more *= find_device(measured.DEVICE).bandwidth / device.bandwidth
    return (pieces * UPDATE_BYTES + sums) / (device.bandwidth * measured.UPDATE_OF_BANDWIDTH) + more


def _no_sums(config: RunConfig, replicas: int, micro_batches: int) -> bool:
    """Whether gradients are used as the backward pass leaves them."""
    optimizer = config.optimizer
    as_they_come = optimizer.precision != "fp32" and OPTIMIZERS[optimizer.optimizer_name].updates_slices
    single = replicas == 1 and micro_batches == 1 and config.parallel.pipeline_model_parallel_size == 1
    return as_they_come and single


def _seconds(sent: Traffic, device: Device) -> float:
    return (sent.inside / device.link + sent.between / device.network) / measured.LINK_REACHED
