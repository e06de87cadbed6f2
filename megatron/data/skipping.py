"""Training data without some of its samples."""

from collections.abc import Sequence
from typing import Any

from megatron.data.errors import DataError
from megatron.data.loader import Samples
from megatron.data.spans import Span, merge, nth_outside


class SkippingSamples:
    """The samples of ``source`` in their order, but for those in ``spans``; then, to make up for these, from the start.

    Args:
        source: samples 0 .. n - 1.
        spans: of samples of ``source`` to leave out.
        length: how many samples this has.

    Raises:
        DataError: nothing is left.
    """

    def __init__(self, source: Samples, spans: Sequence[Span], length: int) -> None:
        self._source, self._length = source, length
        self._spans = [(first, min(end, len(source))) for first, end in merge(spans) if first < len(source)]
        self._kept = len(source) - sum(end - first for first, end in self._spans)
        if self._kept < 1:
            raise DataError(f"all {len(source)} samples of the training data are to be left out (--skip-samples)")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of a dataset of {self._length}")
        return self._source[nth_outside(self._spans, index % self._kept)]
