"""How much memory a GPU needs in training, by what it is needed for, before anything is launched.

A model of what ``torch.cuda.max_memory_allocated`` reports. Two moments of an update can be its peak:

* the loss's backward pass: all activations that wait for the backward pass, and the logits; no gradient yet but that of
  the token table.
* a layer's backward pass: what earlier layers still keep, this layer's work, and the gradients of the layers behind it.
  Of the first layer it is the end of the backward pass, with all gradients.

What stays between updates is counted in bytes a weight (:mod:`megatron.planning.optimizer_memory`), by the processes
that have the same weights: data-parallel ranks for weights outside the experts, expert-data-parallel ranks for experts.
The fp32 sums of gradients stay too. There are none if an update is one micro-batch, without a pipeline, and nobody has
the same weights: then bf16 gradients grow in the backward pass and are gone after the update.

What a layer keeps for its backward pass is counted in :mod:`megatron.planning.activations`. With
``--checkpoint-activations`` it keeps its input alone, and has the rest while its backward pass runs.

Not in it: the CUDA context, NCCL's buffers and what the allocator cannot use (:data:`megatron.planning.devices.USABLE`
leaves room for them). For fp16, gradients are counted until they are reduced and as fp32 sums besides. Of fp16, fp32
and CPU offload nothing was measured.

Shapes: T tokens of a micro-batch, H hidden, F inner size, E experts, V padded vocabulary, N heads.
"""

import dataclasses
import itertools
from collections.abc import Mapping

from megatron.config import RunConfig
from megatron.parallel.grid import Grid
from megatron.planning.activations import (
    FP32,
    inner_units,
    inner_units_of_experts,
    kept_by_layer,
    own_stream_bytes,
    rows_of_experts,
    stream_bytes,
    uses_kernel,
    width,
)
from megatron.planning.optimizer_memory import BytesPerParameter, bytes_per_parameter
from megatron.planning.parameters import StageParameters, parameters_of_stage
from megatron.planning.placement import place_layers

OFFLOAD_BUCKET = 500_000_000 * FP32  # DeepSpeed's, in which it adds gradients over processes
CHUNK = 2 * 256 * 2**20  # fp32 logits that a shared cross-entropy holds at a time, twice

PARTS = {
    "weights": "in the number format of the computation",
    "fp32 weights": "this GPU's share, ZeRO-1",
    "moments": "of Adam, this GPU's share",
    "gradients": "at the peak",
    "activations": "that wait for the backward pass",
    "work": "of the layer, or of the head, that is at work",
    "all-to-all": "buffers of tokens that leave and arrive",
    "logits": "and what the loss needs beside them",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs most, by :data:`PARTS`, at the moment when it needs most."""

    parts: Mapping[str, float]
    moment: str
    stage: int
    between: float  # bytes between two updates
    cpu: float  # bytes in CPU memory, of the process that needs most there

    @property
    def peak(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def memory(config: RunConfig, world: int, vocab_size: int, *, kernels: bool = True) -> Memory:
    """What the GPU with most in it holds, over all pipeline stages.

    Args:
        config: of a run; it must fit ``world`` ranks.
        vocab_size: padded.
        kernels: whether the Triton kernels can be used, on GPUs from Ampere on.
    """
    layers = place_layers(config, vocab_size).layers
    first, found = 0, []
    for stage, count in enumerate(layers):
        found.append(_Stage(config, world, vocab_size, stage, range(first, first + count), kernels).peak())
        first += count
    return dataclasses.replace(max(found, key=lambda each: each.peak), cpu=max(each.cpu for each in found))


class _Stage:
    """The memory of a GPU of one pipeline stage."""

    def __init__(
        self, config: RunConfig, world: int, vocab_size: int, stage: int, layers: range, kernels: bool
    ) -> None:
        self._config, self._layers, self._stage, self._vocab = config, layers, stage, vocab_size
        self._kernels = kernels
        parallel, training = config.parallel, config.training
        self._grid = Grid(
            world,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.enable_expert_tensor_parallelism,
        )
        self._width = width(config)
        self._tensor = parallel.tensor_model_parallel_size
        self._tokens = training.micro_batch_size * config.model.seq_length
        self._stream, self._own_stream = stream_bytes(config), own_stream_bytes(config)
        self._micro_batches = training.global_batch_size // (training.micro_batch_size * self._grid.data)
        self._first, self._last = stage == 0, stage == self._grid.pipeline - 1
        self._parameters = parameters_of_stage(config, vocab_size, layers, first=self._first, last=self._last)
        shared = 1 if parallel.enable_expert_tensor_parallelism else self._tensor
        self._expert_ranks = {degree: self._grid.data // degree * shared for degree in self._parameters.experts}
        # bytes of each layer's gradients as autograd makes them: all, and those that stay as they are
        self._made, staying = {}, {}
        for layer in layers:
            groups = self._groups(parameters_of_stage(config, vocab_size, [layer], first=False, last=False))
            self._made[layer] = self._width * sum(count for count, _ in groups)
            # in fp16 they stay until DeepSpeed has reduced them, and a CUDA graph has its own, whatever is added up
            all_stay = config.optimizer.precision == "fp16" or training.cuda_graphs
            staying[layer] = self._width * sum(n for n, ranks in groups if all_stay or not self._each(ranks).lasting)
        behind = itertools.accumulate((staying[layer] for layer in reversed(layers)), initial=0.0)
        self._staying_behind = dict(zip(reversed(layers), behind, strict=False))

    def peak(self) -> Memory:
        """The largest of all moments."""
        states = self._states()
        # 1F1B: the first stage has as many micro-batches under way as there are stages, the last has one
        under_way = min(self._micro_batches, self._grid.pipeline - self._stage)
        kept = {layer: self._kept(layer) for layer in self._layers}
        below = dict(zip(self._layers, itertools.accumulate(kept.values(), initial=0.0), strict=False))
        others = (under_way - 1) * sum(kept.values()) + (under_way * self._embedding_mask() if self._first else 0.0)
        moments = {f"backward pass of layer {n}": self._at_layer(n, below[n] + others) for n in self._layers}
        if self._last:
            moments["loss"] = self._at_loss(kept, others)
        if self._config.optimizer.grad_reduce_in_bf16:  # a copy of one group's sums
            copied = max((2 * count for count, ranks in self._groups(self._parameters) if ranks > 1), default=0)
            moments["reduction of gradients"] = {"gradients": copied}
        moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
        whole = {name: states.get(name, 0.0) + parts.get(name, 0.0) for name in PARTS}
        cpu = sum(count * self._each(ranks).cpu for count, ranks in self._groups(self._parameters))
        return Memory(whole, moment, self._stage, between=sum(states.values()), cpu=cpu)

    # ------------------------------------------------------------------------------------------------ between updates

    def _states(self) -> dict[str, float]:
        states: dict[str, float] = dict.fromkeys(("weights", "fp32 weights", "moments", "gradients"), 0.0)
        for count, ranks in self._groups(self._parameters):
            each = self._each(ranks)
            states["weights"] += count * each.weights
            states["fp32 weights"] += count * each.fp32_weights
            states["moments"] += count * each.moments
            states["gradients"] += count * each.gradients * each.lasting
        return states

    def _each(self, ranks: int) -> BytesPerParameter:
        """Bytes of a weight that this many ranks have."""
        one = self._micro_batches == 1 and self._grid.pipeline == 1
        return bytes_per_parameter(self._config.optimizer, ranks, one_micro_batch=one)

    def _groups(self, parameters: StageParameters) -> list[tuple[int, int]]:
        """Parameters, and the ranks that have the same ones, of each optimizer group."""
        experts = ((count, self._expert_ranks[degree]) for degree, count in parameters.experts.items())
        return [(parameters.dense, self._grid.data), *experts]

    # -------------------------------------------------------------------------------------------------- kinds of peak

    def _at_loss(self, kept: Mapping[int, float], others: float) -> dict[str, float]:
        hidden = self._config.model.hidden_size
        logits = self._tokens * self._vocab / self._tensor * self._width
        overwritten = self._tensor == 1 and self._kernels  # by their gradient
        if not overwritten:
            logits = 2 * logits + CHUNK
        return {
            "activations": others + sum(kept.values()) + self._own_stream,  # and what the last norm reads
            "work": 2 * self._stream,  # what the last norm gives, and its gradient
            "gradients": self._vocab * hidden / self._tensor * self._width,
            "logits": logits,
        }

    def _at_layer(self, layer: int, held: float) -> dict[str, float]:
        """The end of a layer's backward pass, when its gradients are there and nothing of it is freed yet.

        ``held`` are the bytes that other layers and micro-batches keep.
        """
        config = self._config
        table = self._vocab * config.model.hidden_size / self._tensor * self._width  # waits for the embedding's
        whole = self._kernels and uses_kernel("top1_layer", config, layer)
        again = inner_units_of_experts(config, layer) if self._kernels and not whole else 0.0  # GELU's output
        bucket = OFFLOAD_BUCKET if config.optimizer.optimizer_cpu_offload else 0.0
        return {
            "activations": held + self._full(layer) + self._own_stream,
            "work": 2 * self._own_stream + (inner_units(config, layer) + again) * self._width,
            "gradients": (table if self._last else 0.0) + self._gradients(layer) + bucket,
            "all-to-all": self._exchange(layer),
        }

    def _gradients(self, layer: int) -> float:
        """Gradients in the weights' format: of this layer, and of those behind it if they are not added to a sum."""
        return self._made[layer] + self._staying_behind[layer]

    # ----------------------------------------------------------------------------------------------------- of one layer

    def _kept(self, layer: int) -> float:
        """Bytes that a layer keeps for a micro-batch's backward pass."""
        return self._own_stream if self._config.training.checkpoint_activations else self._full(layer)

    def _full(self, layer: int) -> float:
        """The same without activation checkpointing."""
        return kept_by_layer(self._config, layer, kernels=self._kernels)

    def _exchange(self, layer: int) -> float:
        """Rows that leave, rows that arrive, and their copy in the experts' order."""
        config = self._config
        if config.moe.experts_of_layer(layer) == 1:
            return 0.0
        if self._kernels and uses_kernel("top1_layer", config, layer):
            return 0.0
        return 3 * rows_of_experts(config, layer)[0] * config.model.hidden_size * self._width

    def _embedding_mask(self) -> float:
        return self._own_stream / self._width if self._config.model.hidden_dropout > 0 else 0.0
