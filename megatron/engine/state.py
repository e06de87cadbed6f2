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
from megatron.engine.eight_bit import AdamW8bit, Stretch
from megatron.engine.loss_scale import load_scaler_state, scaler_state
from megatron.parallel.sharding import global_shape, place, shards_of

if TYPE_CHECKING:
    from megatron.engine.deepspeed_internals import Fragment

MODEL, EXP_AVG, EXP_AVG_SQ = "model.", "exp_avg.", "exp_avg_sq."


class ShardedState:
    """What this rank keeps of a model and its optimizer.

    Args:
        model: the model, or this rank's stage of it, after DeepSpeed has laid out its optimizer's memory.
        adam: the optimizer that DeepSpeed calls.
        loss_scaler: DeepSpeed's, with fp16.
    """

    def __init__(self, model: nn.Module, adam: torch.optim.AdamW, loss_scaler: Any | None) -> None:
        self.model = model
        self._adam = adam
        self._loss_scaler = loss_scaler
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._shards = {name: shards_of(p) for name, p in model.named_parameters()}

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

    def _fragments(self) -> Iterator[tuple[str, nn.Parameter, "Fragment | None"]]:
        from megatron.engine.deepspeed_internals import fragments

        return fragments(self.model, self._adam)

    def saved_tensors(self) -> list[ShardedTensor]:
        """This rank's share of fp32 weights and Adam moments, as views: nothing is copied or communicated.

        Moments of 8 bits are decoded when they are written, one box at a time. A parameter that an earlier pipeline
        stage has too is left to that stage.
        """
        from megatron.engine.deepspeed_internals import is_tied_replica

        entries = []
        for name, parameter, fragment in self._fragments():
            if fragment is None or is_tied_replica(parameter):
                continue
            parts = ((MODEL, fragment.master), (EXP_AVG, fragment.exp_avg), (EXP_AVG_SQ, fragment.exp_avg_sq))
            for prefix, flat in parts:
                cut = functools.partial(self._boxes, name, fragment.start)
                boxes = flat.boxes(cut) if isinstance(flat, Stretch) else cut(flat)
                entries.append(ShardedTensor(prefix + name, self._global_shape(name), flat.dtype, boxes))
        return entries

    @contextlib.contextmanager
    def loading(self, moments: bool = True) -> Iterator[list[ShardedTensor]]:
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
        if self._loss_scaler is not None:
            state["loss_scaler"] = scaler_state(self._loss_scaler)
        return state

    def load_scalar_state(self, state: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`scalar_state` gave; None is the start of a run."""
        state = {"adam_step": 0} if state is None else state
        for entry in self._adam.state.values():
            entry["step"].fill_(state["adam_step"])
        if self._loss_scaler is not None:
            load_scaler_state(self._loss_scaler, state.get("loss_scaler"))
