"""Progress of work through files: a bar on a terminal, a line now and then in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class ProgressBar:
    """Shows documents/s, MB/s of text and the time left.

    Args:
        total_bytes: size of all input as it lies on disk.
        log_interval: documents between two lines where standard error is no terminal; 0 prints none.
        unit: of ``total_bytes``, where it is something else.
    """

    def __init__(self, total_bytes: int, log_interval: int, unit: str = "B") -> None:
        self._total, self._interval = max(total_bytes, 1), log_interval
        self._documents, self._text_bytes, self._logged, self._consumed = 0, 0, 0, 0
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total_bytes, unit=unit, unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, consumed: int, documents: int, text_bytes: int, rejected: int) -> None:
        """Note that ``consumed`` bytes of all input are done, and what the last step added."""
        self._documents += documents
        self._text_bytes += text_bytes
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = f"{self._documents / seconds:,.0f} docs/s, {self._text_bytes / seconds / 1e6:.2f} MB/s"
        if rejected:
            rates += f", {rejected} rejected"
        if not self._bar.disable:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(consumed - self._consumed)
        elif self._interval > 0 and self._documents // self._interval > self._logged:
            self._logged = self._documents // self._interval
            left = seconds * (self._total / max(consumed, 1) - 1)
            print(
                f"{self._documents:,} documents, {100 * consumed / self._total:.1f}%, {rates}, "
                f"{left // 60:.0f}:{left % 60:02.0f} left",
                file=sys.stderr,
                flush=True,
            )
        self._consumed = consumed
