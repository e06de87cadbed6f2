"""What of fp16's loss scaler is state, and goes on in a resumed run; all else is set by the run's own flags.

The scaler is DeepSpeed's: ``LossScaler`` has a fixed scale and no state. The state of ``DynamicLossScaler`` is the
scale, the count of updates and the last one of them that overflowed, from which it knows when to double the scale, and
how many overflows are left before it halves it. That last number is kept with the setting it counts down from
(``delayed_shift``, which is ``--hysteresis``), so that another setting can take its place.
"""

from collections.abc import Mapping
from typing import Any

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "delayed_shift")


def scaler_state(scaler: Any) -> dict[str, float] | None:
    """JSON-able state of a dynamic scaler; None of a fixed one, which has none."""
    return {name: getattr(scaler, name) for name in _STATE} if scaler.dynamic else None


def load_scaler_state(scaler: Any, saved: Mapping[str, Any] | None) -> None:
    """Have a scaler go on from what :func:`scaler_state` gave.

    A fixed scale stays as the flags say, and a dynamic one starts as they say if there is no state of another.
    Checkpoints of earlier versions hold every number of the scaler, the settings of that run too, which are not taken.
    """
    if not scaler.dynamic or saved is None or "last_overflow_iter" not in saved:
        return
    scaler.cur_scale = max(saved["cur_scale"], scaler.min_scale)
    scaler.cur_iter, scaler.last_overflow_iter = saved["cur_iter"], saved["last_overflow_iter"]
    scaler.cur_hysteresis = max(scaler.delayed_shift - (saved["delayed_shift"] - saved["cur_hysteresis"]), 1)


def headroom(scaler: Any) -> tuple[float, int]:
    """The scale, and how many overflows it takes to halve it: each overflow lowers this, down to the smallest scale."""
    return float(scaler.cur_scale), scaler.cur_hysteresis if scaler.dynamic else 0
