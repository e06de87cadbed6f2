"""The state of a model and its optimizer under ZeRO-1, as a checkpoint takes it: global tensors by name, and scalars.

This module does not import DeepSpeed before an engine exists.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron.checkpoint import Box, ShardedTensor, flat_boxes
from megatron.engine.loss_scale import load_scaler_state, scaler_state
from megatron.engine.optim import ShardedOptimizer
from megatron.moe.balancing import learned_buffers
from megatron.parallel.sharding import collect_layouts, global_boxes, global_shape

if TYPE_CHECKING:
    from megatron.engine.deepspeed_internals import Fragment

MODEL = "model."  # before the names of weights; names of optimizer states begin with the state's name


class ShardedState:
    """What this rank keeps of a model and its optimizer.

    Args:
        model: the model, or this rank's stage of it, after DeepSpeed has laid out its optimizer's memory.
        optimizer: the one that DeepSpeed calls.
        loss_scaler: DeepSpeed's, with fp16.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer, loss_scaler: Any | None) -> None:
        self.model = model
        self._sharded_optimizer = optimizer
        self._loss_scaler = loss_scaler
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._layouts = collect_layouts(model)

    def _global_shape(self, name: str) -> tuple[int, ...]:
        return global_shape(self._shapes[name], self._layouts[name].shards)

    def _boxes(self, name: str, start: int, flat: torch.Tensor) -> list[Box]:
        """Cut ``flat``, which lies at ``start`` of this rank's flattened parameter, into boxes of the global tensor."""
        shape = self._shapes[name]
        boxes = []
        for offsets, sizes, at in flat_boxes(shape, start, flat.numel()):
            count = torch.Size(sizes).numel()
            box = flat.narrow(0, at, count).view(sizes)
            boxes.extend(Box(*placed) for placed in global_boxes(offsets, box, shape, self._layouts[name].shards))
        return boxes

    def _fragments(self) -> Iterator[tuple[str, nn.Parameter, "Fragment | None"]]:
        from megatron.engine.deepspeed_internals import fragments

        return fragments(self.model, self._sharded_optimizer)

    def saved_tensors(self) -> list[ShardedTensor]:
        """This rank's share of fp32 weights and optimizer states, as views: nothing is copied or communicated.

        Encoded states are decoded when they are written, one box at a time. A parameter that an earlier pipeline
        stage has too is left to that stage.
        """
        from megatron.engine.deepspeed_internals import is_tied_replica

        entries = []
        for name, parameter, fragment in self._fragments():
            if fragment is None or is_tied_replica(parameter):
                continue
            cut = functools.partial(self._boxes, name, fragment.start)
            slices = {MODEL: fragment.master} | {f"{state}.": slice_ for state, slice_ in fragment.states.items()}
            for prefix, slice_ in slices.items():
                boxes = cut(slice_) if isinstance(slice_, torch.Tensor) else slice_.boxes(cut)
                entries.append(ShardedTensor(prefix + name, self._global_shape(name), slice_.dtype, boxes))
        return entries + self._balancer_state()

    def _balancer_state(self) -> list[ShardedTensor]:
        """What balancers have learned, which every rank that has the layer holds whole."""
        return [
            ShardedTensor(MODEL + name, tuple(buffer.shape), buffer.dtype, [Box((0,), buffer)])
            for name, buffer in learned_buffers(self.model).items()
        ]

    @contextlib.contextmanager
    def loading(self, moments: bool = True) -> Iterator[list[ShardedTensor]]:
        """Yields the tensors to load into; on leaving without an error the loaded weights are taken over.

        Weights are read in full (each rank computes with all of its parameters), optimizer states only as far as this
        rank keeps them; without ``moments`` they are set to 0, as at the start of a run.
        """
        entries, weights = self._balancer_state(), {}
        for name, parameter, fragment in self._fragments():
            weights[name] = torch.empty(parameter.shape, dtype=torch.float32)
            whole = self._boxes(name, 0, weights[name].view(-1))
            entries.append(ShardedTensor(MODEL + name, self._global_shape(name), torch.float32, whole))
            if fragment is None:
                continue
            for state, slice_ in fragment.states.items():
                buffer = slice_ if isinstance(slice_, torch.Tensor) else slice_.load_buffer()
                if not moments:
                    buffer.zero_()
                    continue
                boxes = self._boxes(name, fragment.start, buffer)
                entries.append(ShardedTensor(f"{state}.{name}", self._global_shape(name), buffer.dtype, boxes))
        yield entries
        with torch.no_grad():
            for name, parameter, fragment in self._fragments():
                parameter.copy_(weights[name])
                if fragment is not None:
                    fragment.master.copy_(weights[name].view(-1).narrow(0, fragment.start, fragment.numel))
        self._sharded_optimizer.finish_loading()

    def scalar_state(self) -> dict[str, Any]:
        """What the optimizer keeps besides tensors, JSON-able."""
        shard = self._sharded_optimizer.param_groups[0]["params"][0]
        state: dict[str, Any] = {"adam_step": int(self._sharded_optimizer.state[shard]["step"])}
        if self._loss_scaler is not None:
            state["loss_scaler"] = scaler_state(self._loss_scaler)
        return state

    def load_scalar_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`scalar_state` gave; None is the start of a run."""
        state = {"adam_step": 0} if state is None else state
        for entry in self._sharded_optimizer.state.values():
            entry["step"].fill_(state["adam_step"])
        if self._loss_scaler is not None:
            load_scaler_state(self._loss_scaler, state.get("loss_scaler"))
