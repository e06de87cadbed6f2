"""What a run makes sure of before it starts, and what it watches for while it trains."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.config.option import option, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


@dataclasses.dataclass
class GuardConfig:
    """Preflight of all nodes, updates that hang, spikes of the loss."""

    preflight: bool = option(
        False, "Before training, check on every node GPUs, links, clocks, disk, data and versions; what is broken ends"
        " the run, what is slow is told.", resumable=True,
    )  # fmt: skip
    preflight_only: bool = option(
        False, "Check as --preflight does, print a table of the nodes and end: status 0 if nothing is broken or slow.",
        resumable=True,
    )  # fmt: skip
    watchdog_factor: float | None = option(
        None, "End the run, with the stacks of all ranks, when an update takes more than this many times the median of"
        " the last ones (default: never).", above=1, resumable=True,
    )  # fmt: skip
    watchdog_min_seconds: float = option(
        300.0, "What the watchdog lets any update take, in seconds.", above=0, resumable=True
    )
    spike_sigmas: float | None = option(
        None, "Go back to an earlier checkpoint, and leave data out, when the loss lies more than this many standard"
        " deviations above its running median (default: never).", above=0, resumable=True,
    )  # fmt: skip
    spike_updates: int = option(5, "Updates in a row with such a loss that make a spike.", min=1, resumable=True)
    spike_window: int = option(
        100, "Updates that the running median and the deviation are taken over.", min=4, resumable=True
    )
    spike_restarts: int = option(
        3, "How often a run goes back for a spike; later ones are told and trained through.", min=1, resumable=True
    )


@rule("spike_sigmas", "save", "save_interval", "keep_last")
def spikes(config: "RunConfig", world_size: int) -> Iterator[str]:
    """A run has an earlier checkpoint to go back to."""
    checkpoint = config.checkpoint
    if config.guard.spike_sigmas is None:
        return
    if checkpoint.save is None or checkpoint.save_interval == 0:
        yield "--spike-sigmas requires checkpoints to go back to; add --save DIR, with --save-interval above 0"
    if checkpoint.keep_last == 1:
        yield "--spike-sigmas requires a checkpoint from before the spike, and --keep-last 1 keeps none; use 2 or more"
