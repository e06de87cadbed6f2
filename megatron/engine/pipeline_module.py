"""A pipeline stage in the form DeepSpeed trains.

DeepSpeed's pipeline is a list of layers, of which each process builds some. Here each stage is one of them, a
:class:`megatron.model.gpt.GPTModel` with some of the model's layers, and what runs is that.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence

import torch
from deepspeed.runtime.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megatron.engine.deepspeed_internals import accumulated
from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums, cross_entropy, sum_moe_losses
from megatron.model.randomness import seed_generators
from megatron.moe.layer import MoEStats
from megatron.parallel.initialize import Topology


class TokenTable(TiedLayerSpec):
    """The token table, which the first and the last stage have both: DeepSpeed adds up its gradients."""

    def __init__(self, stage: GPTModel) -> None:
        super().__init__("token table", nn.Module)
        self._stage = stage

    def build(self, log: bool = False) -> nn.Module:
        """The table of this process's stage."""
        return self._stage.embedding.word_embeddings


class GPTPipeline(PipelineModule):
    """The stage of this process, its losses, and what it counts.

    A stage passes on activations only. The losses of its MoE layers act on the gradient where they arise
    (:func:`attach_loss`).

    Args:
        stage: the part of the model that this process has.
        topology: of this process.
        marker: what tells DeepSpeed of experts.
    """

    def __init__(self, stage: GPTModel, topology: Topology, marker: nn.Module | None) -> None:
        stages = topology.pipeline_parallel_size
        grid = PipeModelDataParallelTopology(
            num_pp=stages, num_mp=topology.tensor_parallel_size, num_dp=topology.data_parallel_size
        )
        table = TokenTable(stage)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds and its list of layers
            super().__init__([table, *[stage] * stages, table], topology=grid, loss_fn=self._loss)
        self.stage = stage
        self.marker = marker
        experts = enumerate(stage.moe.experts_per_layer(stage.config.num_layers))
        self._moe_layers = {layer: count for layer, count in experts if count > 1}
        self._device = topology.device
        self.begin([], 1.0)

    def _partition_layers(self, method: str = "uniform") -> None:
        """One stage for each process, the first and the last with the token table."""
        self.parts = [0, *range(2, self._num_layers - 1), self._num_layers]
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def get_tied_weights_and_groups(self) -> list:
        """The token table's gradient where DeepSpeed adds it up between stages: fp16's is in its fp32 accumulator."""
        return [(accumulated(weight), group) for weight, group in super().get_tied_weights_and_groups()]

    def begin(self, seeds: Sequence[int], loss_scale: float, documents: Iterable[dict[str, torch.Tensor]] = ()) -> None:
        """Get ready for the micro-batches that these seeds and documents belong to, and count from zero.

        Args:
            seeds: of all that is random in each micro-batch, equal on all stages.
            loss_scale: what the loss of one micro-batch is multiplied by before the backward pass.
            documents: ``position_ids`` and ``cu_seqlens`` of :meth:`megatron.model.gpt.GPTModel.hidden_states`.
        """
        self._micro_batches = zip(seeds, documents, strict=True)
        self._loss_scale = loss_scale
        self.sums = LossSums(
            torch.zeros(4, device=self._device),
            [torch.zeros(experts, dtype=torch.int64, device=self._device) for experts in self._moe_layers.values()],
            torch.zeros(len(self._moe_layers), dtype=torch.int64, device=self._device),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the next micro-batch. DeepSpeed's schedule takes them in order on every stage.

        Args:
            x: the stage before's activations [B, S, H]; for the first stage the token ids, int64 [B, S].

        Returns:
            Activations [B, S, H]; of the last stage logits [B, S, V].
        """
        seed, documents = next(self._micro_batches)
        if self.training:
            seed_generators(seed)
        position_ids, cu_seqlens = documents.get("position_ids"), documents.get("cu_seqlens")
        x, stats = self.stage.hidden_states(x, position_ids=position_ids, cu_seqlens=cu_seqlens)
        if stats:
            self._count(stats)
            x = attach_loss(x, self.stage.moe_loss(*sum_moe_losses(stats.values())), self._loss_scale)
        if self.marker is not None:
            for nothing in self.marker.parameters():  # a gradient, if zero, for the placeholder of experts here
                x = attach_loss(x, nothing.sum(), 0.0)
        return self.stage.head(x) if self.stage.with_head else x

    def _count(self, stats: dict[int, MoEStats]) -> None:
        for number, layer in enumerate(self._moe_layers):
            if layer in stats:
                self.sums.losses[1] += stats[layer].aux_loss.detach()
                self.sums.losses[2] += stats[layer].z_loss.detach()
                self.sums.counts[number] += stats[layer].counts_E
                self.sums.dropped[number] += stats[layer].dropped

    def _loss(self, logits_BSV: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = cross_entropy(logits_BSV, *labels, self.stage.tensor_group)
        self.sums.losses[0] += loss.detach()
        self.sums.losses[3] += 1.0
        return loss


def attach_loss(x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """``x`` unchanged; in the backward pass ``loss`` gets the gradient ``scale``, as if scale * loss were added later.

    So a loss that arises in the middle of a pipeline need not travel to its end.
    """
    return _AttachLoss.apply(x, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.scale), None
