"""Spans of numbers."""

import itertools
import random

import pytest

from megatron.data.spans import merge, nth_outside, parse_span


def test_a_span_is_first_to_before_end():
    assert parse_span("96-160") == (96, 160)
    for wrong in ("96", "160-96", "5-5", "-3-5", "a-b", "1-2-3", ""):
        with pytest.raises(ValueError, match="expected FIRST-END"):
            parse_span(wrong)


def test_merging_and_counting_agree_with_sets():
    generator = random.Random(0)
    for _ in range(200):
        spans = [(first, first + generator.randint(1, 6)) for first in generator.choices(range(30), k=4)]
        inside = {number for first, end in spans for number in range(first, end)}
        merged = merge(spans)
        assert [number for first, end in merged for number in range(first, end)] == sorted(inside)
        assert all(end < later for (_, end), (later, _) in itertools.pairwise(merged))
        outside = [number for number in range(60) if number not in inside]
        assert [nth_outside(merged, index) for index in range(20)] == outside[:20]
