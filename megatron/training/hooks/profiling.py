"""A profile of an update: which kernels take the time, and how long the device has nothing to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent

from megatron.training.clock import Step
from megatron.training.hooks.hook import Hook

ROWS = 30  # of the table


class Profiler(Hook):
    """Profiles one update, number ``--profile-step`` of this start of the run, on the first rank."""

    def pre_train(self) -> None:
        """Count the updates from here."""
        self._first = self.run.clock.steps + 1
        self._profiling = contextlib.ExitStack()

    def pre_step(self) -> None:
        """Start the profile. The watchdog does not count the update, on any rank."""
        logging, number = self.run.config.logging, self.run.clock.steps + 1
        if logging.profile is not None and number - self._first + 1 == logging.profile_step:
            self._profiling.enter_context(self.run.watchdog.paused())
            if self.run.topology.is_first:
                self._profiling.enter_context(
                    profiled(Path(logging.profile), f"update {number}", self.run.topology.device)
                )

    def post_step(self, step: Step) -> None:
        """End the profile when the device is through with the update."""
        self._profiling.close()


@contextlib.contextmanager
def profiled(folder: Path | None, title: str, device: torch.device) -> Iterator[None]:
    """Profile what happens inside, and print and write what was seen.

    Args:
        folder: gets ``trace.json`` (for chrome://tracing or https://ui.perfetto.dev) and ``table.txt``; None for the
            printed table alone.
        title: what is profiled.
        device: on a GPU kernels are counted, elsewhere torch's operators.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize(device)
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        yield
        if on_gpu:
            torch.cuda.synchronize(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=70)
    if on_gpu:
        whole, idle = idle_share(seen)
        title += f": {whole:.1f} ms from the first kernel to the last, idle {idle:.1%}"
    print(f"{title}\n{table}", flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.txt").write_text(f"{title}\n{table}\n", encoding="utf-8")
        seen.export_chrome_trace(str(folder / "trace.json"))


def idle_share(seen: torch.profiler.profile) -> tuple[float, float]:
    """Milliseconds from the first kernel or copy to the end of the last, and the share of them in which none ran.

    A named range of the program is an event on the device too, as long as what it spans, and does not count.
    """
    events: list[FunctionEvent] = list(seen.events() or ())
    return spans_idle(
        [
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
    )


def spans_idle(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """The same of spans in microseconds, which may overlap; without any, nothing."""
    if not spans:
        return 0.0, 0.0
    spans = sorted(spans)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    return whole / 1e3, 1 - busy / whole if whole else 0.0
