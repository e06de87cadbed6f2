"""What training and checkpoints use of an engine. Nothing here knows DeepSpeed: any class with these methods will do.

An engine trains a model, or this rank's part of one. Its methods are collective: all ranks call them together, in the
same order. :func:`megatron.engine.pipeline.build_engine` makes the engine of a run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron.checkpoint import ShardedTensor

if TYPE_CHECKING:
    from megatron.model.loss import LossSums

MicroBatch = Mapping[str, Any]
"""Sequences that go through the model at once, B of S tokens each, on the CPU.

``tokens`` and ``labels`` are int64 [B, S], ``loss_mask`` is fp32 [B, S]; ``sample_index`` is the number of the first
sequence in the run. Where the run keeps documents apart there are also ``position_ids``, int64 [B, S], and
``cu_seqlens`` (:mod:`megatron.data.documents`).
"""


class AsyncTensor:
    """A tensor that the device has yet to compute. Reading it waits for that tensor only, not for later work."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._copied = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value


class AsyncScalar(AsyncTensor):
    """A number that the device has yet to compute."""

    def __float__(self) -> float:
        return float(self.wait())


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer update did. The device may not have done it yet: read the properties as late as you can."""

    sums: "LossSums"  # of this rank's micro-batches
    lr: float
    norm: float | AsyncScalar  # gradient norm; not finite where the update was skipped
    scale_fell: bool = False  # skipped because of fp16's loss scale, which falls now or soon: nothing is wrong
    read_monitors: Callable[[], dict[str, Any]] | None = None  # gives ``monitors``, once they are known

    @functools.cached_property
    def grad_norm(self) -> float:
        """L2 norm of the gradient of the global batch's mean loss, before clipping; inf when the update was skipped."""
        norm = float(self.norm)
        return norm if math.isfinite(norm) else math.inf

    @functools.cached_property
    def monitors(self) -> dict[str, Any] | None:
        """Figures by which to see that training becomes unstable, JSON-able and equal on all ranks, such as
        :func:`megatron.engine.monitors.figures` describes; None if the step was not to measure them."""
        return None if self.read_monitors is None else self.read_monitors()

    @property
    def skipped(self) -> bool:
        """Whether a gradient was not finite; weights and optimizer states are then as before."""
        return self.grad_norm == math.inf


class Engine(Protocol):
    """A model, its optimizer, and what a training step is."""

    def train_step(self, micro_batches: Sequence[MicroBatch], tokens_after: int, monitored: bool = False) -> StepResult:
        """One optimizer update.

        Args:
            micro_batches: this rank's share of the global batch; every rank passes the same number, at least one.
            tokens_after: tokens that the run has consumed once this batch is done; decides the learning rate.
            monitored: whether to measure :attr:`StepResult.monitors`. It changes no other number.
        """
        ...

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> "LossSums":
        """Sums of the losses of this rank's micro-batches in evaluation mode; nothing changes and nothing is random.

        Raises:
            ValueError: there are no micro-batches.
        """
        ...

    def check_replicas(self) -> None:
        """Compare the parameters that several ranks hold.

        Raises:
            ReplicasDiffer: on every rank, if some differ.
        """
        ...

    def saved_tensors(self) -> list[ShardedTensor]:
        """This rank's part of the state, for :func:`megatron.checkpoint.save`.

        Weights are named ``model.{parameter}``, optimizer states ``{state}.{parameter}``, such as ``exp_avg.…``; all
        are fp32 unless a state is kept in another format, and have the parameter's global shape.
        """
        ...

    def loading(self, moments: bool = True) -> AbstractContextManager[list[ShardedTensor]]:
        """A context that gives the tensors to load a checkpoint into, and takes them over when it ends without error.

        Args:
            moments: load optimizer states too; without, they are set to 0, as at the start of a run.
        """
        ...

    def scalar_state(self) -> dict[str, Any]:
        """What the optimizer keeps besides tensors, JSON-able."""
        ...

    def load_scalar_state(self, state: Mapping[str, Any] | None) -> None:
        """Continue from what :meth:`scalar_state` gave; None is the start of a run."""
        ...
