"""The engine over DeepSpeed: ZeRO-1, for models that are not cut into pipeline stages."""

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megatron.config import RunConfig
from megatron.data.documents import DOCUMENT_FIELDS
from megatron.data.loader import SAMPLE_FIELDS
from megatron.engine.base import AsyncScalar, StepResult
from megatron.engine.cuda_graphs import GraphedMicroBatches
from megatron.engine.loss_scale import headroom
from megatron.engine.monitors import Monitors
from megatron.engine.offload import use_cores
from megatron.engine.optim import OPTIMIZERS
from megatron.engine.optim.groups import parameter_groups
from megatron.engine.schedule import learning_rate
from megatron.engine.state import ShardedState
from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums
from megatron.model.randomness import seed_generators
from megatron.moe.balancing import learn, learners
from megatron.parallel.initialize import Topology
from megatron.parallel.replicas import check_replicas
from megatron.parallel.sharding import collect_layouts

NO_VALIDATION = "the validation set is empty; raise --eval-iters or give validation documents in --split"


class _TrainedModule(nn.Module):
    """A whole model in the form DeepSpeed trains: from a micro-batch to its loss, with the marker of experts beside."""

    def __init__(self, model: GPTModel, marker: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.marker = marker

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, LossSums]:
        documents = {name: batch[name] for name in DOCUMENT_FIELDS if name in batch}
        return self.model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], **documents)


def micro_batch_seed(seed: int, sample_index: int) -> int:
    """Seed of everything random in the forward pass that starts with sample ``sample_index`` of the run.

    Dropout and routing depend on the run's seed and on the data alone, not on how often a generator was used before:
    a resumed run repeats them exactly, and so does another layout, but for dropout under another tensor-parallel size.
    """
    return random.Random(f"{seed}/{sample_index}").getrandbits(63)


class DeepSpeedEngine(ShardedState):
    """Trains a model: forward, backward, gradient reduction, clipping, ZeRO-1 update; its state is that of ZeRO-1."""

    _engine: Any  # DeepSpeed's engine
    _optimizer: Any  # DeepSpeed's, around the one that is passed to it; its type depends on the precision

    def __init__(self, model: GPTModel, config: RunConfig, topology: Topology) -> None:
        os.environ.setdefault("DS_ACCELERATOR", topology.device.type)
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        from megatron.engine import deepspeed_config, deepspeed_internals
        from megatron.engine.bf16_update import BF16Update

        self._internals = deepspeed_internals
        self._config = config
        self._topology = topology
        self._decay_tokens = config.optimizer.lr_decay_tokens or config.training.train_tokens or 1
        unit = deepspeed_internals.ModelParallelUnit(topology)
        deepspeed_internals.start()
        deepspeed_internals.register_groups(topology, unit, config.expert_parallel_degrees())
        marker = deepspeed_internals.expert_markers(config, collect_layouts(model)) if config.moe.enabled else None
        module = self._trained_module(model, marker).to(topology.device)
        if config.optimizer.optimizer_cpu_offload and topology.device.type == "cuda":
            use_cores(topology.launch.world_size)
        layouts = collect_layouts(module)
        deepspeed_internals.mark_parameters(module, layouts)
        groups = parameter_groups(module, layouts, config.optimizer, config.moe)
        deepspeed_internals.mark_groups(groups)
        optimizer_class = OPTIMIZERS[config.optimizer.optimizer_name]
        optimizer = optimizer_class.from_config(groups, config.optimizer, config.training.compile)
        if topology.launch.rank == 0:
            optimizer.log_warnings()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config.build(config, topology.data_parallel_size),
            mpu=None if topology.pipeline_parallel_size > 1 else unit,  # a pipeline has its own
            dist_init_required=False,
        )
        bf16 = isinstance(self._optimizer, BF16_Optimizer)
        by_parameter = {parameter: layouts[name] for name, parameter in module.named_parameters()}
        self._update = BF16Update(self._optimizer, by_parameter, config.optimizer, topology) if bf16 else None
        optimizer.init_state()  # after BF16Update has freed the gradients' fp32 sums, which may never be needed
        deepspeed_internals.allow_smallest_loss_scale(self._optimizer)
        deepspeed_internals.offload_from_where_gradients_are_reduced(self._optimizer)
        self._monitors = Monitors(model, topology)
        if self._update is not None:
            self._update.on_reduced = self._measure
        else:
            deepspeed_internals.call_before_step(self._optimizer, self._measure)
        scaler = self._optimizer.loss_scaler if config.optimizer.precision == "fp16" else None
        super().__init__(model, optimizer, scaler)
        self._learners = learners(model)
        self._graphs = None
        if config.training.cuda_graphs:
            self._graphs = GraphedMicroBatches(module, model, topology.device, self._monitors.samples)

    def _trained_module(self, model: GPTModel, marker: nn.Module | None) -> nn.Module:
        """What DeepSpeed trains: ``model`` with its losses, and the marker of experts."""
        return _TrainedModule(model, marker)

    def train_step(
        self, micro_batches: Sequence[Mapping[str, Any]], tokens_after: int, monitored: bool = False
    ) -> StepResult:
        """One optimizer update.

        Args:
            micro_batches: this rank's share of the global batch; every rank passes the same number. Each has
                ``tokens``, ``labels`` and ``loss_mask`` of shape [B, S] and ``sample_index``, the number of its first
                sample in the run; and ``position_ids`` and ``cu_seqlens`` where the run is to keep documents apart.
            tokens_after: consumed tokens of the run once this batch is done; decides the learning rate.
            monitored: whether to measure what :func:`megatron.engine.monitors.figures` describes.
        """
        self._check_step(micro_batches)
        lr = self._set_learning_rate(tokens_after)
        self._engine.train()
        self._begin(len(micro_batches), monitored)
        sums = None
        for number, batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            new = self._forward_backward(batch, len(micro_batches))
            sums = new if sums is None else sums + new
        assert sums is not None  # there is a micro-batch
        before = self._headroom()
        self._engine.step()
        return self._end_step(sums, lr, before)

    def _forward_backward(self, batch: Mapping[str, Any], count: int) -> LossSums:
        """One of ``count`` micro-batches of an update: its losses; its gradients are added to the update's."""
        seed = micro_batch_seed(self._config.training.seed, int(batch["sample_index"]))
        if self._graphs is not None and self._graphs.accepts(batch):
            sums = self._graphs.run(batch, seed, count)
            self._internals.end_backward(self._engine)
            return sums
        seed_generators(seed)
        loss, sums = self._engine(self._to_device(batch))
        self._engine.backward(loss / count, scale_wrt_gas=False)
        return sums

    def _set_learning_rate(self, tokens_after: int) -> float:
        lr = learning_rate(self._config.optimizer, tokens_after, self._decay_tokens)
        for group in self._sharded_optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        return lr

    def _begin(self, micro_batches: int, monitored: bool) -> None:
        self._monitors.begin(monitored)
        if self._update is not None:
            self._update.begin(micro_batches)

    def _measure(self) -> None:
        """Measure the step, if it is monitored; called when its gradients are reduced."""
        if not self._monitors.wanted:
            return
        kinds, update = self._monitors.kinds, self._update
        if update is not None:
            self._monitors.measure({kind: update.squares_of(parameters) for kind, parameters in kinds.items()})
            return
        norms = dict(self._internals.reduced_gradient_norms(self._optimizer, self._topology.tensor_parallel_rank))
        zero, scale = torch.zeros((), device=self._topology.device), self._loss_scale()
        of_kinds = {k: torch.stack([zero, *(norms[p] for p in norms if p in kinds[k])]).double() for k in kinds}
        self._monitors.measure({kind: (x / scale).square().sum() for kind, x in of_kinds.items()})

    def _end_step(self, sums: LossSums, lr: float, before: tuple[float, int] | None) -> StepResult:
        """Let routers learn from the update just done, and say what it was.

        Args:
            before: what :meth:`_headroom` gave before it.
        """
        result = self._result(sums, lr, before)
        finite = not result.skipped if self._update is None else self._update.norm.isfinite()
        groups = self._topology.data_parallel_group, self._topology.tensor_group
        learn(self._learners, *groups, finite)
        return result

    def _result(self, sums: LossSums, lr: float, before: tuple[float, int] | None) -> StepResult:
        if self._update is not None:
            return StepResult(sums, lr, AsyncScalar(self._update.norm), read_monitors=self._monitors.reader())
        skipped = bool(self._optimizer.overflow)
        norm = math.inf if skipped else float(self._optimizer._global_grad_norm)
        after = self._headroom()
        fell = before is not None and after is not None and after < before
        return StepResult(sums, lr, norm, skipped and fell, self._monitors.reader())

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Mapping[str, Any]]) -> LossSums:
        """Losses of micro-batches in evaluation mode; nothing changes and nothing is random.

        Raises:
            ValueError: there are no micro-batches.
        """
        self._engine.eval()
        sums: LossSums | None = None
        for batch in micro_batches:
            self._check_documents(batch)
            new = self._engine.module(self._to_device(batch))[1]
            sums = new if sums is None else sums + new
        if sums is None:
            raise ValueError(NO_VALIDATION)
        return sums

    def check_replicas(self) -> None:
        """Compare the parameters that several ranks hold; see :func:`megatron.parallel.replicas.check_replicas`."""
        check_replicas(self.model.named_parameters(), self._layouts, self._topology)

    def _loss_scale(self) -> float:
        return float(self._optimizer.loss_scaler.cur_scale) if self._config.optimizer.precision == "fp16" else 1.0

    def _headroom(self) -> tuple[float, int] | None:
        """How far fp16's loss scale is from its end; None in other formats."""
        return headroom(self._optimizer.loss_scaler) if self._config.optimizer.precision == "fp16" else None

    def _to_device(
        self, batch: Mapping[str, Any], names: Sequence[str] = (*SAMPLE_FIELDS, *DOCUMENT_FIELDS)
    ) -> dict[str, Any]:
        return {name: batch[name].to(self._topology.device, non_blocking=True) for name in names if name in batch}

    def _check_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for micro-batches that are no update of this run."""
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch; got none")
        for batch in micro_batches:
            self._check_documents(batch)

    def _check_documents(self, batch: Mapping[str, Any]) -> None:
        data = self._config.data
        for option, name in (("reset_position_ids", "position_ids"), ("reset_attention_mask", "cu_seqlens")):
            if getattr(data, option) != (name in batch):
                raise ValueError(
                    f"{option} is {getattr(data, option)}, but the micro-batch has {', '.join(map(repr, batch))}; make "
                    "micro-batches by megatron.data.documents.with_documents under the options of the run"
                )
