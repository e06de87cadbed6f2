"""An engine in plain torch, for one process: what training needs of an engine, and nothing of DeepSpeed.

python tests/engine/plain_engine.py --train-tokens 1K ... -- --train-tokens 2K ...    # two runs, one after the other
"""

import contextlib
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megatron.checkpoint import Box, ShardedTensor
from megatron.config import RunConfig
from megatron.engine.base import Engine, MicroBatch, StepResult
from megatron.engine.schedule import learning_rate
from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums
from megatron.parallel.initialize import Topology


class PlainEngine:
    """A dense model and SGD with momentum, whose one state is called ``momentum``."""

    def __init__(self, config: RunConfig, topology: Topology, vocab_size: int) -> None:
        self.config = config.optimizer
        self.model = GPTModel(config.model, config.moe, vocab_size, seed=config.training.seed)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self.steps = 0

    def losses(self, batch: MicroBatch) -> LossSums:
        loss, sums = self.model.loss(batch["tokens"], batch["labels"], batch["loss_mask"])
        if loss.requires_grad:
            loss.backward()
        return sums

    def train_step(self, micro_batches: Sequence[MicroBatch], tokens_after: int, monitored: bool = False) -> StepResult:
        first, *others = [self.losses(batch) for batch in micro_batches]
        lr = learning_rate(self.config, tokens_after, 10_000)
        with torch.no_grad():
            grads = {n: p.grad / len(micro_batches) for n, p in self.model.named_parameters() if p.grad is not None}
            norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
            for name, p in self.model.named_parameters():
                p -= lr * self.momentum[name].mul_(0.9).add_(grads[name])
                p.grad = None
        self.steps += 1
        return StepResult(sum(others, first), lr, float(norm))

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> LossSums:
        self.model.eval()
        first, *others = [self.losses(batch) for batch in micro_batches]
        self.model.train()
        return sum(others, first)

    def check_replicas(self) -> None:
        """There are none."""

    def saved_tensors(self) -> list[ShardedTensor]:
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"momentum.{name}": value for name, value in self.momentum.items()}
        return [ShardedTensor(n, tuple(t.shape), t.dtype, [Box((0,) * t.dim(), t)]) for n, t in tensors.items()]

    @contextlib.contextmanager
    def loading(self, moments: bool = True) -> Iterator[list[ShardedTensor]]:
        yield [tensor for tensor in self.saved_tensors() if moments or tensor.name.startswith("model.")]

    def scalar_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_scalar_state(self, state: Mapping[str, Any] | None) -> None:
        self.steps = 0 if state is None else state["steps"]


def build(config: RunConfig, topology: Topology, vocab_size: int) -> Engine:
    return PlainEngine(config, topology, vocab_size)


def run(arguments: list[str]) -> None:
    """One run of the trainer with this engine; ends the process."""
    from megatron.config.flags import parse_args
    from megatron.training import pretrain
    from megatron.training.signals import StopSignals

    pretrain.build_engine = build
    with StopSignals() as signals:
        sys.exit(pretrain.pretrain(parse_args(arguments), signals))


if __name__ == "__main__":
    import megatron.training.pretrain  # once, for all processes  # noqa: F401

    split = sys.argv.index("--")
    for arguments in (sys.argv[1:split], sys.argv[split + 1 :]):
        process = multiprocessing.get_context("fork").Process(target=run, args=(arguments,))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(1)
