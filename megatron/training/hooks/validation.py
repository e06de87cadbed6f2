"""Losses on validation and test sets."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.engine.base import Engine
from megatron.training.batches import micro_batches, micro_batches_per_rank
from megatron.training.clock import Step
from megatron.training.hooks.hook import Hook
from megatron.training.metrics import expert_balance, mean_losses, reduce_sums


class Validation(Hook):
    """Evaluates the validation sets every ``--eval-interval`` updates and at the end, and the test sets at the end."""

    def needs_outcome(self, step: Step) -> bool:
        """Whether the validation sets are due after this update."""
        training = self.run.config.training
        return step.crosses(training.eval_interval, training.global_batch_size)

    def end_step(self, step: Step) -> None:
        """Evaluate the sets that are due, and log their losses."""
        run = self.run
        at_the_end = run.clock.samples >= run.total_samples
        if self.needs_outcome(step) or at_the_end:
            with run.paused():
                self._evaluate("valid", run.data.valid)
                if at_the_end:
                    self._evaluate("test", run.data.test)

    def _evaluate(self, kind: str, sets: Mapping[str, Any]) -> None:
        """Log the loss of each set; that of --split or a blend, which bears the name of its kind, without a name."""
        run, training = self.run, self.run.config.training
        count = training.eval_iters * micro_batches_per_rank(run, training.global_batch_size)
        for name, dataset in sets.items():
            batches = micro_batches(run, dataset, consumed_samples=0, num_workers=0)
            record = evaluate(run.engine, itertools.islice(batches, count))
            run.log(kind, **({} if name == kind else {"set": name}), **record)


def evaluate(engine: Engine, micro_batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean loss over this and all other ranks' micro-batches; every rank passes the same number of them."""
    reduced = reduce_sums(engine.evaluate(micro_batches))
    losses = mean_losses(reduced)
    record: dict[str, Any] = {**losses, "perplexity": math.exp(min(losses["loss"], 700.0))}
    if balance := expert_balance(reduced):
        record["experts"] = balance
    return record
