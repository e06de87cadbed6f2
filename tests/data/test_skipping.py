"""Training data without some of its samples."""

import pytest

from megatron.data.errors import DataError
from megatron.data.skipping import SkippingSamples


def read(spans: list[tuple[int, int]], length: int, of: int = 10) -> list[int]:
    samples = SkippingSamples(list(range(of)), spans, length)
    assert len(samples) == length
    return [samples[index] for index in range(length)]


def test_what_is_left_out_is_made_up_for_from_the_start():
    assert read([], 10) == list(range(10))
    assert read([(2, 4), (7, 9)], 6) == [0, 1, 4, 5, 6, 9]
    assert read([(7, 9), (2, 4), (3, 4)], 10) == [0, 1, 4, 5, 6, 9, 0, 1, 4, 5]
    assert read([(8, 40), (50, 60)], 10) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert read([(0, 9)], 3) == [9, 9, 9]


def test_errors():
    with pytest.raises(DataError, match="all 10 samples"):
        read([(0, 10)], 3)
    with pytest.raises(IndexError):
        SkippingSamples([1, 2], [], 2)[2]
