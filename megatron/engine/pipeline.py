"""The engine of a pipeline: DeepSpeed's 1F1B schedule as an :class:`megatron.engine.base.Engine`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron.config import RunConfig
from megatron.data.documents import DOCUMENT_FIELDS
from megatron.data.loader import SAMPLE_FIELDS
from megatron.engine.base import Engine, StepResult
from megatron.engine.engine import NO_VALIDATION, DeepSpeedEngine, micro_batch_seed
from megatron.model.gpt import GPTModel
from megatron.model.layer import compile_layers
from megatron.model.loss import LossSums
from megatron.parallel.initialize import Topology
from megatron.planning.placement import place_layers

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine


class PipelineEngine(DeepSpeedEngine):
    """Trains one stage of a model, together with the processes that have the others.

    All stages of a pipeline are given the same micro-batches: the first reads their tokens, the last their labels, and
    every one their sample numbers, from which it seeds what is random, and where their documents end. ``sums`` hold
    what this stage knows: the LM loss on the last one, MoE losses and counts where the layer is. Added over all
    processes they are those of the model.

    The token table exists twice, on the first and on the last stage. DeepSpeed adds up the gradients of both, so both
    make the same updates; in the gradient norm and in checkpoints the first one counts.
    """

    _engine: "DeepSpeedPipelineEngine"

    def _trained_module(self, model: GPTModel, marker: nn.Module | None) -> nn.Module:
        from megatron.engine.pipeline_module import GPTPipeline

        self._module = GPTPipeline(model, self._topology, marker)
        return self._module

    def train_step(
        self, micro_batches: Sequence[Mapping[str, Any]], tokens_after: int, monitored: bool = False
    ) -> StepResult:
        """One optimizer update; see :meth:`Engine.train_step <megatron.engine.base.Engine.train_step>`."""
        self._check_step(micro_batches)
        lr = self._set_learning_rate(tokens_after)
        scale, before = self._loss_scale(), self._headroom()
        count, engine = len(micro_batches), self._engine
        engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        self._module.begin(self._seeds(micro_batches), scale / count, self._documents(micro_batches))
        self._begin(count, monitored)
        engine.train_batch(self._inputs(micro_batches))
        return self._end_step(self._module.sums, lr, before)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Mapping[str, Any]]) -> LossSums:
        """Losses of micro-batches in evaluation mode, all of them in one run of the pipeline."""
        batches = list(micro_batches)
        if not batches:
            raise ValueError(NO_VALIDATION)
        for batch in batches:
            self._check_documents(batch)
        self._module.begin(self._seeds(batches), 1.0, self._documents(batches))
        self._engine.eval_batch(self._inputs(batches), bcast_loss=False, num_micro_batches=len(batches))
        return self._module.sums

    def _seeds(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[int]:
        return [micro_batch_seed(self._config.training.seed, int(batch["sample_index"])) for batch in micro_batches]

    def _documents(self, micro_batches: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
        """Where the documents of each micro-batch are, as a stage takes it."""
        for batch in micro_batches:
            yield self._to_device(batch, DOCUMENT_FIELDS)

    def _inputs(self, micro_batches: Sequence[Mapping[str, Any]]):
        """Micro-batches in the form DeepSpeed takes them: what enters the first stage, what the loss needs."""
        for batch in micro_batches:
            on_device = self._to_device(batch, SAMPLE_FIELDS)
            yield on_device["tokens"], (on_device["labels"], on_device["loss_mask"])


def build_engine(config: RunConfig, topology: Topology, vocab_size: int) -> Engine:
    """The model of a run, or this process's stage of it, and the engine that trains it."""
    stage, stages = topology.pipeline_parallel_rank, topology.pipeline_parallel_size
    model = GPTModel(
        config.model,
        config.moe,
        vocab_size,
        topology.expert_group,
        topology.tensor_group,
        layers=place_layers(config, vocab_size).layers_of(stage),
        with_embedding=stage == 0,
        with_head=stage == stages - 1,
        seed=config.training.seed,
        checkpoint_activations=config.training.checkpoint_activations,
    )
    if compiles(config, topology):
        compile_layers(model.layers.values())
    return (DeepSpeedEngine if stages == 1 else PipelineEngine)(model, config, topology)


def compiles(config: RunConfig, topology: Topology) -> bool:
    """Whether layers are compiled: on GPUs, where no process exchanges anything inside of what would be fused."""
    return config.training.compile and topology.device.type == "cuda" and topology.tensor_parallel_size == 1
