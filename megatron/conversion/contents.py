"""What a checkpoint holds, whatever its format: a run's metadata, and global tensors under our names, read when wanted.

Shapes: E experts, H hidden, F FFN hidden.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron.checkpoint.errors import CheckpointError, some
from megatron.checkpoint.tensors import dtype_name
from megatron.config import ModelConfig, MoEConfig, RunConfig
from megatron.config.run import from_dict
from megatron.engine.optim import OPTIMIZERS
from megatron.model.gpt import GPTModel
from megatron.moe.balancing import InputMean, build_balancer, learned_buffers

MODEL = "model."
# end the names of what a trained router depends on
ROUTER_BUFFERS = (".router.balancer.expert_bias", ".router.centering.input_mean")


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is wanted.

    ``read(None)`` gives the whole of it, ``read(i)`` its row ``i`` along the first dimension without the others.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int | None], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None) -> "Lazy":
        """``change`` of it, which must be elementwise: it is given the whole or a row, and keeps the shape."""
        return Lazy(self.shape, dtype or self.dtype, lambda row: change(self.read(row)))


@dataclasses.dataclass(frozen=True)
class Contents:
    """A checkpoint. ``tensors`` are named ``model.…`` and, with an optimizer's state, ``{state}.…``, as ``exp_avg.…``.

    What balancers have learned is among the tensors of the model, fp32 whatever the weights' format.

    ``meta`` is what our checkpoints keep in meta.json; its ``optimizer`` is None where there is no optimizer state.
    ``tokenizer_files`` tells where the tokenizer's files are, if elsewhere than the configuration says. ``notes`` tell
    what the reader left out or changed.
    """

    where: str  # for messages
    meta: dict[str, Any]
    tensors: Mapping[str, Lazy]
    step: int = 0
    tokenizer_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def config(self) -> RunConfig:
        """The configuration of the run."""
        return from_dict(self.meta["config"])

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer's state is there."""
        return bool(optimizer_tensors(self.tensors))

    @property
    def states(self) -> dict[str, int]:
        """The states of the run's optimizer, with the power of the gradient that each is an average of."""
        return dict(OPTIMIZERS[self.config.optimizer.optimizer_name].states)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of all weights.

        Raises:
            CheckpointError: there are several.
        """
        found = {lazy.dtype for name, lazy in self.tensors.items() if name.startswith(MODEL) and not is_learned(name)}
        if len(found) > 1:
            raise CheckpointError(
                f"{self.where} has tensors in {sorted(map(dtype_name, found))}; choose one: --dtype fp32"
            )
        return found.pop()

    def check(self) -> "Contents":
        """Itself, if it holds each parameter and learned buffer of its model once, with the right shape, and nothing
        unknown.

        Raises:
            CheckpointError: it does not; names are given.
        """
        described = self.config.model, self.config.moe, self.meta["vocab_size"]
        expected = parameter_shapes(*described)
        prefixes = (MODEL, *(f"{state}." for state in self.states)) if self.has_optimizer else (MODEL,)
        wanted = {prefix + name: shape for prefix in prefixes for name, shape in expected.items()}
        wanted |= {MODEL + name: shape for name, shape in buffer_shapes(*described).items()}
        problems = [f"{name} is missing" for name in wanted if name not in self.tensors]
        problems += [f"{name} is no tensor of this model" for name in self.tensors if name not in wanted]
        problems += [
            f"{name} is {list(lazy.shape)}, expected {list(wanted[name])}"
            for name, lazy in self.tensors.items()
            if name in wanted and tuple(lazy.shape) != wanted[name]
        ]
        if problems:
            raise CheckpointError(
                f"{self.where} does not hold the model that its configuration describes: {some(problems)}. Nothing was "
                "written. Restore the file that was changed, or give the checkpoint that belongs to it"
            )
        return self


def parameter_shapes(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The global shape of each parameter by name, in the model's order; no memory is taken."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPTModel(model, moe, vocab_size).named_parameters()}


def buffer_shapes(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each buffer that a router learns by name, in the model's order; no memory is taken."""
    with torch.device("meta"):
        return {name: tuple(buffer.shape) for name, buffer in learned_buffers(GPTModel(model, moe, vocab_size)).items()}


def is_learned(name: str) -> bool:
    """Whether a tensor is a buffer that a router learns."""
    return ".router.balancer." in name or ".router.centering." in name


def initial_buffer(name: str, shape: tuple[int, ...], moe: MoEConfig) -> Lazy:
    """The buffer of this name as it is at the start of a run."""
    learner = InputMean(shape[0]) if ".router.centering." in name else build_balancer(shape[0], moe)
    value = getattr(learner, name.rsplit(".", 1)[1])
    return Lazy(shape, value.dtype, lambda row: value if row is None else value[row])


def optimizer_tensors(tensors: Iterable[str]) -> list[str]:
    """Those of the names that are not of weights."""
    return [name for name in tensors if not name.startswith(MODEL)]


def is_stacked(name: str) -> bool:
    """Whether a tensor is a stack of experts, [E, ...], read and written row by row."""
    return ".mlp.experts." in name


def without_optimizer(contents: Contents) -> Contents:
    """The weights alone."""
    weights = {name: lazy for name, lazy in contents.tensors.items() if name.startswith(MODEL)}
    return dataclasses.replace(contents, tensors=weights, meta=contents.meta | {"optimizer": None})
