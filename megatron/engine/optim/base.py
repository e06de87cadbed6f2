"""What an optimizer is to the engine: it updates flat fp32 shards, and its state has names."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch

from megatron.config import OptimizerConfig

if TYPE_CHECKING:  # planning imports this package, and the import would take longer than its work
    from megatron.checkpoint import Box


class EncodedSlice(Protocol):
    """Consecutive elements of an optimizer state that is not kept as a plain tensor."""

    dtype: torch.dtype  # once decoded

    def numel(self) -> int:
        """Number of elements."""
        ...

    def boxes(self, cut: "Callable[[torch.Tensor], list[Box]]") -> "list[Box]":
        """The boxes that ``cut`` makes of these elements, one-dimensional; each is decoded when it is written."""
        ...

    def load_buffer(self) -> torch.Tensor:
        """A tensor to load decoded elements into; :meth:`ShardedOptimizer.finish_loading` encodes them."""
        ...


StateSlice: TypeAlias = torch.Tensor | EncodedSlice


@dataclasses.dataclass(frozen=True)
class ParameterSlice:
    """Consecutive elements of a shard with all that belongs to them: contiguous tensors of equal numbers of elements.

    ``master`` is fp32, ``gradient`` fp32 or bf16, and ``weight`` bf16, into which the new weights are written.
    ``states`` are the optimizer's, by name.
    """

    master: torch.Tensor
    gradient: torch.Tensor
    weight: torch.Tensor
    states: Mapping[str, torch.Tensor]


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of the one-dimensional fp32 shards that ZeRO-1 gives to a rank, one for each parameter group.

    A subclass names its ``states``, makes itself in :meth:`from_config`, and updates in ``step()`` like any optimizer
    of torch. Its update must be elementwise: a shard has parts of many parameters.

    Attributes:
        states: what it keeps for each weight, by name, with the power of the gradient that it is an average of (1 for a
            first moment, 2 for a second one). A checkpoint names the tensors ``{state}.{parameter}``.
        updates_slices: whether bf16 models are updated by :meth:`update_slices`, and not by ``step()``.
        library: a package that it needs beside torch, and the extra that installs it.
    """

    states: ClassVar[Mapping[str, int]]
    updates_slices: ClassVar[bool] = False
    library: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def from_config(
        cls, groups: Sequence[dict[str, Any]], config: OptimizerConfig, compiled: bool
    ) -> "ShardedOptimizer":
        """The optimizer of a run.

        Args:
            groups: of :func:`megatron.engine.optim.groups.parameter_groups`.
            config: of the run. The learning rate is set before every step.
            compiled: whether torch.compile may be used, on a GPU.
        """
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, config: OptimizerConfig) -> float:
        """Bytes of state for each weight, in memory."""
        return 4 * len(cls.states)

    @classmethod
    def checkpoint_bytes(cls, config: OptimizerConfig) -> int:
        """Bytes of state for each weight, in a checkpoint."""
        return 4 * len(cls.states)

    def init_state(self) -> None:
        """Make the state of all shards now instead of at the first step, so that a checkpoint can be loaded into it."""
        for group in self.param_groups:
            for shard in group["params"]:
                self.state[shard].update(self.new_state(shard, group))

    def new_state(self, shard: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """``step``, the number of updates as an fp32 scalar, and each of ``states``, zeros of the shard's length."""
        step = torch.zeros((), dtype=torch.float32, device=shard.device)
        return {"step": step} | {name: torch.zeros_like(shard, requires_grad=False) for name in self.states}

    def finish_loading(self) -> None:
        """Take over what was loaded into buffers of :meth:`EncodedSlice.load_buffer`."""

    def log_warnings(self) -> None:
        """Log what the user should know of these settings; called on one rank."""

    def update_slices(
        self, group: Mapping[str, Any], slices: Iterable[ParameterSlice], factor: torch.Tensor, finite: torch.Tensor
    ) -> None:
        """One update of a bf16 model's parameter group, which does not wait for the device.

        Args:
            group: of ``param_groups``; it has one shard.
            slices: of the shard, each to be updated by itself.
            factor: fp32 scalar that gradients are multiplied by (mean over ranks, clipping); NaN if the gradient norm
                is not finite, and then nothing may change.
            finite: bool scalar, whether it is.
        """
        raise NotImplementedError
