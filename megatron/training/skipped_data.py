"""What a run leaves out of its training data."""

import dataclasses
from typing import Any

from megatron.config import RunConfig
from megatron.data.spans import Span, merge, nth_outside, parse_span
from megatron.training.clock import Step


@dataclasses.dataclass
class SkippedData:
    """Spans of the training data that a run leaves out, and how often it went back for a loss spike.

    Part of every checkpoint, as ``detours``. The clock counts only what is trained on, so sample n of the run is the
    n-th sample of the data outside ``spans``.

    Attributes:
        spans: samples of the training data, merged.
        restarts: how often the run went back.
    """

    spans: list[Span] = dataclasses.field(default_factory=list)
    restarts: int = 0

    @classmethod
    def of(cls, config: RunConfig, meta: dict[str, Any] | None, consumed_samples: int) -> "SkippedData":
        """That of a run that begins, or resumes from a checkpoint with ``meta``.

        Raises:
            ValueError: ``--skip-samples`` names new data that the run has read or passed already.
        """
        saved = (meta or {}).get("detours", {"skipped": [], "restarts": 0})
        before = [(first, end) for first, end in saved["skipped"]]
        read_up_to = nth_outside(before, consumed_samples)
        for word in config.data.skip_samples:
            span = parse_span(word)
            if merge([*before, span]) != before and span[0] < read_up_to:
                raise ValueError(
                    f"--skip-samples {word}: the run has read its data up to sample {read_up_to}; give a span that "
                    "begins there or later, or go on from an earlier checkpoint (--load DIR/step_N and another --save)"
                )
        return cls(merge([*before, *map(parse_span, config.data.skip_samples)]), saved["restarts"])

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"skipped": [list(span) for span in self.spans], "restarts": self.restarts}

    def span_of(self, first: Step, last: Step) -> Span:
        """The samples of the training data from the update ``first`` to the update ``last``."""
        return nth_outside(self.spans, first.start), nth_outside(self.spans, last.end - 1) + 1

    def restart_without(self, span: Span) -> None:
        """Leave out ``span`` too, because the run goes back for a spike."""
        self.spans = merge([*self.spans, span])
        self.restarts += 1
