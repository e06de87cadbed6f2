"""A pipeline stage in the form DeepSpeed trains.

DeepSpeed's pipeline is a list of layers of which each process builds a stretch. Here the stretch is given by our
placement, and what runs is :class:`megatron.model.pipeline_stages.PipelineStage` over the layers that were built.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence

import torch
from deepspeed.runtime.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron.config import RunConfig
from megatron.engine.deepspeed_internals import accumulated
from megatron.engine.engine import LossSums
from megatron.model.embedding import Embedding
from megatron.model.initialization import initialize
from megatron.model.layer import TransformerLayer
from megatron.model.loss import cross_entropy
from megatron.model.pipeline_stages import OutputTable, PipelineStage, add_loss
from megatron.parallel.groups import ExpertGroup
from megatron.parallel.initialize import Topology
from megatron.parallel.tensor_parallel import LayerNorm

TABLE = "word_embeddings.weight"


class PlacedPipeline(PipelineModule):
    """The stage of this process, its losses, and what it counts.

    Args:
        config: of the run.
        topology: of this process.
        vocab_size: padded.
        layers: number of transformer layers of each stage.
    """

    def __init__(self, config: RunConfig, topology: Topology, vocab_size: int, layers: Sequence[int]) -> None:
        self._layers_of_stages = tuple(layers)
        model, moe = config.model, config.moe
        self._tensor_group = tensor = topology.tensor_group
        specs: list[LayerSpec] = [
            TiedLayerSpec(
                "embedding", Embedding, vocab_size, model.position_rows, model.hidden_size, model.hidden_dropout,
                tensor, tied_weight_attr=TABLE,
            )
        ]  # fmt: skip
        for layer in range(model.num_layers):
            experts = moe.experts_of_layer(layer)
            group = topology.expert_group(moe.place(layer)) if experts > 1 else ExpertGroup(size=1, rank=0, group=None)
            specs.append(LayerSpec(TransformerLayer, model, moe, layer, group, config.training.seed, tensor))
        specs.append(LayerSpec(LayerNorm, model.hidden_size, model.layernorm_epsilon, tensor))
        specs.append(
            TiedLayerSpec("embedding", OutputTable, vocab_size, model.hidden_size, tensor, tied_weight_attr=TABLE)
        )
        grid = PipeModelDataParallelTopology(
            num_pp=topology.pipeline_parallel_size,
            num_mp=topology.tensor_parallel_size,
            num_dp=topology.data_parallel_size,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and its list of layers
            super().__init__(specs, topology=grid, loss_fn=self._loss)
        self.stage = self._assemble(config)
        initialize(self.stage, model.init_method_std, model.num_layers, config.training.seed)
        self._moe_layers = {layer: moe.experts_of_layer(layer) for layer in range(model.num_layers)}
        self._moe_layers = {layer: experts for layer, experts in self._moe_layers.items() if experts > 1}
        self._device = topology.device
        self.marker: nn.Module | None = None
        self.begin([], 1.0)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Cut the list of layers as placed: the embedding goes with the first stage, norm and head with the last."""
        ends = [1 + sum(self._layers_of_stages[: stage + 1]) for stage in range(len(self._layers_of_stages))]
        self.parts = [0, *ends[:-1], self._num_layers]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def get_tied_weights_and_groups(self) -> list:
        """The token table's gradient where DeepSpeed adds it up between stages: fp16's is in its fp32 accumulator."""
        return [(accumulated(weight), group) for weight, group in super().get_tied_weights_and_groups()]

    def _assemble(self, config: RunConfig) -> PipelineStage:
        built = dict(zip(range(self._local_start, self._local_stop), self.forward_funcs, strict=True))
        last = self._num_layers - 1
        return PipelineStage(
            config.moe,
            built.get(0),
            {number - 1: layer for number, layer in built.items() if 0 < number < last - 1},
            built.get(last - 1),
            built.get(last),
            config.training.checkpoint_activations,
        )

    def begin(self, seeds: Sequence[int], loss_scale: float, documents: Iterable[dict[str, torch.Tensor]] = ()) -> None:
        """Get ready for the micro-batches that these seeds and documents belong to, and count from zero.

        ``loss_scale`` is by what the loss of one micro-batch is multiplied before the backward pass. ``documents`` are
        what :class:`megatron.model.pipeline_stages.PipelineStage` takes of them.
        """
        self._micro_batches = zip(seeds, documents, strict=True)
        self._loss_scale = loss_scale
        self.sums = LossSums(
            torch.zeros(4, device=self._device),
            [torch.zeros(experts, dtype=torch.int64, device=self._device) for experts in self._moe_layers.values()],
            torch.zeros(len(self._moe_layers), dtype=torch.int64, device=self._device),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the next micro-batch. DeepSpeed's schedule takes them in order on every stage."""
        seed, documents = next(self._micro_batches)
        x, routed = self.stage(x, seed, self._loss_scale, **documents)
        for number, layer in enumerate(self._moe_layers):
            if layer in routed:
                self.sums.losses[1] += routed[layer].aux_loss.detach()
                self.sums.losses[2] += routed[layer].z_loss.detach()
                self.sums.counts[number] += routed[layer].counts_E
                self.sums.dropped[number] += routed[layer].dropped
        if self.marker is not None:
            for nothing in self.marker.parameters():  # a gradient, if zero, for what stands for experts here
                x = add_loss(x, nothing.sum(), 0.0)
        return x

    def _loss(self, logits_BSV: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = cross_entropy(logits_BSV, *labels, self._tensor_group)
        self.sums.losses[0] += loss.detach()
        self.sums.losses[3] += 1.0
        return loss
