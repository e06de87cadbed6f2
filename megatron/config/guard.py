"""What a run makes sure of before it starts, and what it watches for while it trains."""

import dataclasses

from megatron.config.fields import option


@dataclasses.dataclass
class GuardConfig:
    """Preflight of all nodes, and updates that hang."""

    preflight: bool = option(
        False, "Before training, check on every node GPUs, links, clocks, disk, data and versions; what is broken ends"
        " the run, what is slow is told.",
    )  # fmt: skip
    preflight_only: bool = option(
        False,
        "Check as --preflight does, print a table of the nodes and end: status 0 if nothing is broken or slow.",
    )
    watchdog_factor: float | None = option(
        None, "End the run, with the stacks of all ranks, when an update takes more than this many times the median of"
        " the last ones (default: never).",
    )  # fmt: skip
    watchdog_min_seconds: float = option(300.0, "What the watchdog lets any update take, in seconds.")
