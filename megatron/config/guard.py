"""What a run watches for while it trains."""

import dataclasses

from megatron.config.fields import option


@dataclasses.dataclass
class GuardConfig:
    """Updates that hang."""

    watchdog_factor: float | None = option(
        None, "End the run, with the stacks of all ranks, when an update takes more than this many times the median of"
        " the last ones (default: never).",
    )  # fmt: skip
    watchdog_min_seconds: float = option(300.0, "What the watchdog lets any update take, in seconds.")
