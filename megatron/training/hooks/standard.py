"""The hooks of every run, and their order."""

from collections.abc import Sequence

from megatron.training.hooks.checkpointer import Checkpointer
from megatron.training.hooks.guards import ReplicaCheck, SkippedUpdateLimit, WatchdogTimer
from megatron.training.hooks.hook import Hook
from megatron.training.hooks.instability import InstabilityWarnings
from megatron.training.hooks.profiling import Profiler
from megatron.training.hooks.spikes import SpikeRestarts
from megatron.training.hooks.training_log import TrainingLog
from megatron.training.hooks.validation import Validation
from megatron.training.run import Run


def standard_hooks(run: Run, added: Sequence[Hook] = ()) -> list[Hook]:
    """The hooks of ``run``, with those that its user has added.

    Added hooks see whether a loss is an outlier, and come before the save of an update, which has their states.
    """
    checkpointer = Checkpointer(run.config.checkpoint, run.topology)
    return [
        WatchdogTimer(),
        Profiler(),
        ReplicaCheck(),
        TrainingLog(run),
        InstabilityWarnings(run.config),
        SpikeRestarts(run.config.guard, checkpointer),
        Validation(),
        *added,
        checkpointer,
        SkippedUpdateLimit(checkpointer),
    ]
