"""A warning when training is about to become unstable, while there is time to do something about it.

**The rule.** A figure of :func:`megatron.engine.monitors.figures` is compared with its running median: that of evenly
spaced log lines of the run so far, at least 10 and at most 64 of them. It is high if it is above ten times the median
and above the size from which on it is a danger. If it is high in two log lines in a row, this is logged. The next
warning of the figure, of whatever layer, comes once all layers have been below half of this.

**Sizes.** A softmax over attention or router logits beyond 50 is nearly an argmax, whose gradient vanishes; attention
logits that grow without end are how large transformers diverge (Wortsman et al. 2023, arXiv 2309.14322), and models
trained with their weights rescaled from 100 on did not (Kimi K2, arXiv 2507.20534). Gradients below ``--clip-grad`` are
no danger.
"""

import dataclasses
import math
import statistics
from typing import Any

from megatron.config import RunConfig
from megatron.training.hooks.hook import Hook, Outcome

GROWTH = 10.0
LEAST, MOST = 10, 64  # log lines of a running median
LOGIT = 50.0


class InstabilityWarnings(Hook):
    """Logs when attention logits, router logits or a gradient norm have grown tenfold. It stops nothing."""

    name = "instability"

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        clip = config.optimizer.clip_grad or 1.0
        floors = {"max_attention_logit": LOGIT, "max_router_logit": LOGIT, "grad_norm": clip}
        self._detectors = {figure: GrowthDetector(floor) for figure, floor in floors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the figures before."""
        for figure, detector in self._detectors.items():
            detector.load_state(state.get(figure, {}))

    def state_dict(self) -> dict[str, Any]:
        """The figures that new ones are compared with."""
        return {figure: detector.state() for figure, detector in self._detectors.items()}

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare the figures of a log line with those before."""
        for figure, values in (outcome.result.monitors or {}).items():
            if figure in self._detectors:
                grown = self._detectors[figure].add(self._by_place(figure, values))
                if grown is not None:
                    self._log(figure, grown)

    def _by_place(self, figure: str, values: list[float] | dict[str, float]) -> dict[str, float]:
        """The values by what they belong to, as it is to be called."""
        if isinstance(values, dict):
            return {f"{kind} parameters": value for kind, value in values.items()}
        layers = range(len(values))
        if figure == "max_router_logit":
            experts = self._config.moe.experts_per_layer(self._config.model.num_layers)
            layers = [layer for layer, count in enumerate(experts) if count > 1]
        return {f"layer {layer}": value for layer, value in zip(layers, values, strict=True)}

    def _log(self, figure: str, grown: "Growth") -> None:
        reason = (
            f"{figure} of {grown.place} has grown to {grown.value:.4g}, {grown.value / grown.median:.3g} times its "
            f"running median of {grown.median:.4g}; {self._advice(figure, grown.place)}"
        )
        self.run.log("warning", figure=figure, reason=reason, **dataclasses.asdict(grown))

    def _advice(self, figure: str, place: str) -> str:
        if (figure == "max_attention_logit" or place.startswith("attention")) and not self._config.model.qk_layernorm:
            return "a lower --lr helps, and --qk-layernorm in a new run"
        if figure == "max_router_logit" or place.startswith("router"):
            coeff = self._config.moe.moe_z_loss_coeff
            return f"a larger --moe-z-loss-coeff helps (it is {coeff:g}; 0.001 is usual), or a lower --lr"
        return "a lower --lr helps"


@dataclasses.dataclass(frozen=True)
class Growth:
    """A value that is far above its running median."""

    place: str
    value: float
    median: float


class GrowthDetector:
    """Takes the values of a figure at each log line, and says when one runs away.

    Args:
        floor: no smaller value is high.
    """

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self.load_state({})

    def add(self, values: dict[str, float]) -> Growth | None:
        """Take in the values of a log line, by place. Returns the one that has grown most, the first time."""
        high: dict[str, Growth] = {}
        calm = True
        for place, value in values.items():
            history = self._histories.setdefault(place, History())
            if not math.isfinite(value):  # an update that is skipped, for which there are other words
                continue
            if len(history.values) >= LEAST:
                median = statistics.median(history.values)
                limit = max(GROWTH * median, self._floor)
                calm = calm and value <= limit / 2
                if value > limit:
                    high[place] = Growth(place, value, median)
            history.add(value)
        twice = [growth for place, growth in high.items() if place in self._high]
        self._high = set(high)
        if calm:
            self._warned = False
        if self._warned or not twice:
            return None
        self._warned = True
        return max(twice, key=lambda growth: growth.value / growth.median)

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        histories = {place: dataclasses.asdict(history) for place, history in self._histories.items()}
        return {"histories": histories, "high": sorted(self._high), "warned": self._warned}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave; from an empty one on as if new."""
        self._histories = {place: History(**history) for place, history in state.get("histories", {}).items()}
        self._high = set(state.get("high", ()))
        self._warned: bool = state.get("warned", False)


@dataclasses.dataclass
class History:
    """Of all values so far, every so many-th: at most :data:`MOST`."""

    values: list[float] = dataclasses.field(default_factory=list)
    every: int = 1
    count: int = 0

    def add(self, value: float) -> None:
        """Take in the next value."""
        if self.count % self.every == 0:
            if len(self.values) == MOST:
                del self.values[1::2]
                self.every *= 2
            self.values.append(float(f"{value:.4g}"))
        self.count += 1
