"""What a run makes sure of before it starts, and what it watches for while it trains."""

import dataclasses

from megatron.config.fields import option


@dataclasses.dataclass
class GuardConfig:
    """Preflight of all nodes, updates that hang, spikes of the loss."""

    preflight: bool = option(
        False, "Before training, check on every node GPUs, links, clocks, disk, data and versions; what is broken ends"
        " the run, what is slow is told.",
    )  # fmt: skip
    preflight_only: bool = option(
        False, "Check as --preflight does, print a table of the nodes and end: status 0 if nothing is broken or slow."
    )
    watchdog_factor: float | None = option(
        None, "End the run, with the stacks of all ranks, when an update takes more than this many times the median of"
        " the last ones (default: never).",
    )  # fmt: skip
    watchdog_min_seconds: float = option(300.0, "What the watchdog lets any update take, in seconds.")
    spike_sigmas: float | None = option(
        None, "Go back to an earlier checkpoint, and leave data out, when the loss lies more than this many standard"
        " deviations above its running median (default: never).",
    )  # fmt: skip
    spike_updates: int = option(5, "Updates in a row with such a loss that make a spike.")
    spike_window: int = option(100, "Updates that the running median and the deviation are taken over.")
    spike_restarts: int = option(3, "How often a run goes back for a spike; later ones are told and trained through.")
