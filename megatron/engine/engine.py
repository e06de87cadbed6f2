"""The engine: one model, its optimizer, and what a training step is, behind a narrow seam over DeepSpeed."""

import contextlib
import dataclasses
import functools
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megatron.checkpoint import Box, ShardedTensor, flat_boxes
from megatron.config import RunConfig
from megatron.engine.cuda_graphs import GraphedMicroBatches
from megatron.engine.eight_bit import AdamW8bit, Stretch, warn_of_slow_decay
from megatron.engine.loss_scale import leeway, load_scaler_state, scaler_state
from megatron.engine.offload import use_cores
from megatron.engine.schedule import learning_rate
from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums
from megatron.model.randomness import seed_generators
from megatron.parallel.initialize import Topology
from megatron.parallel.replicas import check_replicas
from megatron.parallel.sharding import global_shape, place, shards_of

MODEL, EXP_AVG, EXP_AVG_SQ = "model.", "exp_avg.", "exp_avg_sq."
# tensors of a micro-batch; the second ones where a run keeps documents apart (see megatron.data.documents)
FIELDS, DOCUMENTS = ("tokens", "labels", "loss_mask"), ("position_ids", "cu_seqlens")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LateNumber:
    """A number that the device has yet to compute; reading it waits for that alone, not for later work."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._there = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def __float__(self) -> float:
        if self._there is not None:
            self._there.synchronize()
        return float(self._value)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer update did. The device may not have done it yet: read the properties as late as you can."""

    sums: LossSums
    lr: float
    norm: float | LateNumber
    scale_fell: bool = False  # skipped for fp16's loss scale, which falls now or soon: nothing is wrong

    @functools.cached_property
    def grad_norm(self) -> float:
        """Before clipping; inf when the update was skipped."""
        norm = float(self.norm)
        return norm if math.isfinite(norm) else math.inf

    @property
    def skipped(self) -> bool:
        """Whether a gradient was not finite; weights and moments are then as before."""
        return self.grad_norm == math.inf


class _TrainedModule(nn.Module):
    """A whole model in the form DeepSpeed trains: from a micro-batch to its loss, with the marker of experts beside."""

    def __init__(self, model: GPTModel, marker: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.marker = marker

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, LossSums]:
        documents = {name: batch[name] for name in DOCUMENTS if name in batch}
        return self.model.loss(batch["tokens"], batch["labels"], batch["loss_mask"], **documents)


def micro_batch_seed(seed: int, sample_index: int) -> int:
    """Seed of everything random in the forward pass that starts with sample ``sample_index`` of the run.

    Dropout and routing depend on the run's seed and on the data alone, not on how often a generator was used before:
    a resumed run repeats them exactly, and so does another layout, but for dropout under another tensor-parallel size.
    """
    return random.Random(f"{seed}/{sample_index}").getrandbits(63)


class Engine:
    """Trains a model: forward, backward, gradient reduction, clipping, ZeRO-1 update; and gives its state away."""

    def __init__(self, model: GPTModel, config: RunConfig, topology: Topology) -> None:
        os.environ.setdefault("DS_ACCELERATOR", topology.device.type)
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        from megatron.engine import deepspeed_config, deepspeed_internals
        from megatron.engine.optimizer import build_adam
        from megatron.engine.update import Update

        self._internals = deepspeed_internals
        self._config = config
        self._topology = topology
        self._decay_tokens = config.optimizer.lr_decay_tokens or config.training.train_tokens or 1
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._experts = {name for name, p in model.named_parameters() if getattr(p, "is_expert", False)}
        self._shards = {name: shards_of(p) for name, p in model.named_parameters()}
        unit = deepspeed_internals.ModelParallelUnit(topology)
        deepspeed_internals.start()
        deepspeed_internals.register_groups(topology, unit, config.expert_parallel_degrees())
        marker = deepspeed_internals.mark_experts(config, model) if config.moe.enabled else None
        deepspeed_internals.mark_model_parallel(model)
        module = self._trained_module(model, marker).to(topology.device)
        if config.optimizer.optimizer_cpu_offload and topology.device.type == "cuda":
            use_cores(topology.launch.world_size)
        self._adam = build_adam(module, config.optimizer, config.training.compile)
        if isinstance(self._adam, AdamW8bit) and topology.launch.rank == 0:
            warn_of_slow_decay((config.optimizer.adam_beta1, config.optimizer.adam_beta2))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self._adam,
            config=deepspeed_config.build(config, topology.data_parallel_size),
            mpu=None if topology.pipeline_parallel_size > 1 else unit,  # a pipeline has its own
            dist_init_required=False,
        )
        bf16 = isinstance(self._optimizer, BF16_Optimizer)
        self._update = Update(self._optimizer, config.optimizer, topology) if bf16 else None
        moments = (DTYPES[config.optimizer.exp_avg_dtype], DTYPES[config.optimizer.exp_avg_sq_dtype])
        # after Update has given back the memory of gradients' sums, which may never be needed
        deepspeed_internals.create_adam_state(self._adam, *moments)
        deepspeed_internals.let_loss_scale_rest(self._optimizer)
        deepspeed_internals.offload_from_where_gradients_are_reduced(self._optimizer)
        self.model = model
        self._graphs = GraphedMicroBatches(module, model, topology.device) if config.training.cuda_graphs else None

    def _trained_module(self, model: GPTModel, marker: nn.Module | None) -> nn.Module:
        """What DeepSpeed trains: ``model`` with its losses, and the marker of experts."""
        return _TrainedModule(model, marker)

    def train_step(self, micro_batches: Sequence[Mapping[str, Any]], tokens_after: int) -> StepResult:
        """One optimizer update.

        Args:
            micro_batches: this rank's share of the global batch; every rank passes the same number. Each has
                ``tokens``, ``labels`` and ``loss_mask`` of shape [B, S] and ``sample_index``, the number of its first
                sample in the run; and ``position_ids`` and ``cu_seqlens`` where the run is to keep documents apart.
            tokens_after: consumed tokens of the run once this batch is done; decides the learning rate.
        """
        lr = self._set_learning_rate(tokens_after)
        self._engine.train()
        sums: LossSums | None = None
        self._begin(len(micro_batches))
        for number, batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            new = self._forward_backward(batch, len(micro_batches))
            sums = new if sums is None else sums + new
        if sums is None:
            raise ValueError("a step needs at least one micro-batch; got none")
        before = self._leeway()
        self._engine.step()
        return self._result(sums, lr, before)

    def _forward_backward(self, batch: Mapping[str, Any], count: int) -> LossSums:
        """One of ``count`` micro-batches of an update: its losses; its gradients are added to the update's."""
        self._check_documents(batch)
        seed = micro_batch_seed(self._config.training.seed, int(batch["sample_index"]))
        if self._graphs is not None and self._graphs.serves(batch):
            sums = self._graphs.run(batch, seed, count)
            self._internals.end_backward(self._engine)
            return sums
        seed_generators(seed)
        loss, sums = self._engine(self._to_device(batch))
        self._engine.backward(loss / count, scale_wrt_gas=False)
        return sums

    def _set_learning_rate(self, tokens_after: int) -> float:
        lr = learning_rate(self._config.optimizer, tokens_after, self._decay_tokens)
        for group in self._adam.param_groups:
            group["lr"] = lr
        return lr

    def _begin(self, micro_batches: int) -> None:
        if self._update is not None:
            self._update.begin(micro_batches)

    def _result(self, sums: LossSums, lr: float, before: tuple[float, int] | None) -> StepResult:
        """What the update just done was; ``before``: what :meth:`_leeway` gave before it."""
        if self._update is not None:
            return StepResult(sums, lr, LateNumber(self._update.norm))
        skipped = bool(self._optimizer.overflow)
        norm = math.inf if skipped else float(self._optimizer._global_grad_norm)
        return StepResult(sums, lr, norm, scale_fell=skipped and before is not None and self._leeway() < before)

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
            raise ValueError("the validation set is empty; raise --eval-iters or give validation documents in --split")
        return sums

    def check_replicas(self) -> None:
        """Compare the parameters that several ranks hold; see :func:`megatron.parallel.replicas.check_replicas`."""
        check_replicas(self.model.named_parameters(), self._topology)

    def _loss_scale(self) -> float:
        return float(self._optimizer.loss_scaler.cur_scale) if self._config.optimizer.precision == "fp16" else 1.0

    def _leeway(self) -> tuple[float, int] | None:
        """How far fp16's loss scale is from its end; None in other formats."""
        return leeway(self._optimizer.loss_scaler) if self._config.optimizer.precision == "fp16" else None

    def _to_device(self, batch: Mapping[str, Any], names: Sequence[str] = (*FIELDS, *DOCUMENTS)) -> dict[str, Any]:
        return {name: batch[name].to(self._topology.device, non_blocking=True) for name in names if name in batch}

    def _check_documents(self, batch: Mapping[str, Any]) -> None:
        data = self._config.data
        for option, name in (("reset_position_ids", "position_ids"), ("reset_attention_mask", "cu_seqlens")):
            if getattr(data, option) != (name in batch):
                raise ValueError(
                    f"{option} is {getattr(data, option)}, but the micro-batch has {', '.join(map(repr, batch))}; make "
                    "micro-batches by megatron.data.documents.with_documents under the options of the run"
                )

    # ------------------------------------------------------------------------------------------------- state

    def _global_shape(self, name: str) -> tuple[int, ...]:
        return global_shape(self._shapes[name], self._shards[name])

    def _boxes(self, name: str, start: int, flat: torch.Tensor) -> list[Box]:
        """Cut ``flat``, which lies at ``start`` of this rank's flattened parameter, into boxes of the global tensor."""
        shape = self._shapes[name]
        boxes = []
        for offsets, sizes, at in flat_boxes(shape, start, flat.numel()):
            count = torch.Size(sizes).numel()
            box = flat.narrow(0, at, count).view(sizes)
            boxes.extend(Box(*placed) for placed in place(offsets, box, shape, self._shards[name]))
        return boxes

    def _fragments(self):
        return self._internals.fragments(self.model, self._adam)

    def saved_tensors(self) -> list[ShardedTensor]:
        """This rank's share of fp32 weights and Adam moments, as views: nothing is copied or communicated.

        Moments of 8 bits are decoded when they are written, one box at a time.
        """
        entries = []
        for name, _, fragment in self._fragments():
            if fragment is None:
                continue
            parts = ((MODEL, fragment.master), (EXP_AVG, fragment.exp_avg), (EXP_AVG_SQ, fragment.exp_avg_sq))
            for prefix, flat in parts:
                cut = functools.partial(self._boxes, name, fragment.start)
                boxes = flat.boxes(cut) if isinstance(flat, Stretch) else cut(flat)
                entries.append(ShardedTensor(prefix + name, self._global_shape(name), flat.dtype, boxes))
        return entries

    @contextlib.contextmanager
    def loading(self, moments: bool = True):
        """Yields the tensors to load into; on leaving without an error the loaded weights are taken over.

        Weights are read in full (each rank computes with all of its parameters), moments only as far as this rank
        keeps them; without ``moments`` they are set to 0, as at the start of a run.
        """
        entries, weights = [], {}
        for name, parameter, fragment in self._fragments():
            weights[name] = torch.empty(parameter.shape, dtype=torch.float32)
            whole = self._boxes(name, 0, weights[name].view(-1))
            entries.append(ShardedTensor(MODEL + name, self._global_shape(name), torch.float32, whole))
            if fragment is None:
                continue
            for prefix, flat in ((EXP_AVG, fragment.exp_avg), (EXP_AVG_SQ, fragment.exp_avg_sq)):
                to_fill = flat.to_fill() if isinstance(flat, Stretch) else flat
                if not moments:
                    to_fill.zero_()
                    continue
                boxes = self._boxes(name, fragment.start, to_fill)
                entries.append(ShardedTensor(prefix + name, self._global_shape(name), to_fill.dtype, boxes))
        yield entries
        with torch.no_grad():
            for name, parameter, fragment in self._fragments():
                parameter.copy_(weights[name])
                if fragment is not None:
                    fragment.master.copy_(weights[name].view(-1).narrow(0, fragment.start, fragment.numel))
        if isinstance(self._adam, AdamW8bit):
            self._adam.take_filled()

    def scalar_state(self) -> dict[str, Any]:
        """What the optimizer keeps besides tensors, JSON-able."""
        flat = self._adam.param_groups[0]["params"][0]
        state: dict[str, Any] = {"adam_step": int(self._adam.state[flat]["step"])}
        if self._config.optimizer.precision == "fp16":
            state["loss_scaler"] = scaler_state(self._optimizer.loss_scaler)
        return state

    def load_scalar_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`scalar_state` gave; None is the start of a run."""
        state = {"adam_step": 0} if state is None else state
        for entry in self._adam.state.values():
            entry["step"].fill_(state["adam_step"])
        if self._config.optimizer.precision == "fp16":
            load_scaler_state(self._optimizer.loss_scaler, state.get("loss_scaler"))
