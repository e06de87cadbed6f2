"""The profile of a few updates."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron.training.hooks.profiling import idle_share, profiled, spans_idle


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], (0.0, 0.0)),
        ([(0, 1000)], (1.0, 0.0)),
        ([(0, 1000), (3000, 4000)], (4.0, 0.5)),
        ([(3000, 4000), (0, 2000), (500, 1000)], (4.0, 0.25)),
        ([(100, 200), (150, 300), (300, 400)], (0.3, 0.0)),
        ([(5, 5)], (0.0, 0.0)),
    ],
)
def test_idle_is_what_no_kernel_covers(spans, expected):
    assert spans_idle(spans) == pytest.approx(expected)


def test_the_host_and_named_ranges_keep_no_device_busy():
    def event(start: float, end: float, device: str, named: bool = False) -> SimpleNamespace:
        kind = getattr(torch.autograd.DeviceType, device)
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(time_range=span, device_type=kind, is_user_annotation=named)

    seen = [event(0, 9000, "CPU"), event(1000, 2000, "CUDA"), event(1000, 5000, "CUDA", named=True)]
    seen.append(event(4000, 5000, "CUDA"))
    assert idle_share(SimpleNamespace(events=lambda: seen)) == pytest.approx((4.0, 0.5))


def test_a_profile_is_printed_and_written(tmp_path, capsys):
    with profiled(tmp_path / "profile", "two products", torch.device("cpu")):
        for _ in range(2):
            torch.randn(64, 64) @ torch.randn(64, 64)
    printed = capsys.readouterr().out
    assert printed.startswith("two products\n")
    assert "aten::mm" in printed
    assert "aten::mm" in (tmp_path / "profile" / "table.txt").read_text()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
