import math
import random

import pytest
import torch

from megatron.checkpoint import Box, CheckpointError, ShardedTensor, flat_boxes
from megatron.checkpoint.tensors import by_name


def random_shape(generator: random.Random) -> tuple[int, ...]:
    return tuple(generator.choice([1, 2, 3, 5]) for _ in range(generator.randrange(5)))


def test_flat_boxes_cut_any_range_exactly():
    generator = random.Random(0)
    for _ in range(500):
        shape = random_shape(generator)
        total = math.prod(shape)
        start = generator.randrange(total + 1)
        numel = generator.randrange(total - start + 1)
        whole = torch.arange(total).view(shape)
        rebuilt, end = torch.full((numel,), -1), 0
        boxes = flat_boxes(shape, start, numel)
        for offsets, sizes, position in boxes:
            assert position == end, "boxes follow each other in the range"
            assert len(offsets) == len(sizes) == len(shape)
            region = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            assert region.shape == sizes
            end = position + region.numel()
            rebuilt[position:end] = region.reshape(-1)
        assert torch.equal(rebuilt, whole.view(-1)[start : start + numel])
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_flat_boxes_known_cases():
    assert flat_boxes((4, 3), 0, 12) == [((0, 0), (4, 3), 0)]
    assert flat_boxes((4, 3), 2, 8) == [((0, 2), (1, 1), 0), ((1, 0), (2, 3), 1), ((3, 0), (1, 1), 7)]
    assert flat_boxes((4, 3), 5, 0) == []
    assert flat_boxes((), 0, 1) == [((), (), 0)]
    assert len(flat_boxes((9, 9, 9), 1, 9**3 - 2)) == 5  # the most that three dimensions need


@pytest.mark.parametrize(("start", "numel"), [(-1, 2), (0, 13), (12, 1), (3, -1)])
def test_flat_boxes_refuse_a_range_outside(start, numel):
    with pytest.raises(ValueError, match=r"not within the 12 elements of shape \(4, 3\)"):
        flat_boxes((4, 3), start, numel)


def entry(*boxes: Box, shape=(4, 3), dtype=torch.float32, name="w") -> ShardedTensor:
    return ShardedTensor(name, shape, dtype, list(boxes))


def test_entries_of_one_name_are_joined_and_empty_boxes_left_out():
    top, bottom = Box((0, 0), torch.zeros(2, 3)), Box((2, 0), torch.ones(2, 3))
    joined = by_name([entry(top), entry(Box((0, 0), torch.zeros(0, 3))), entry(bottom)], exact_dtype=True)
    assert [box.offsets for box in joined["w"].boxes] == [(0, 0), (2, 0)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(Box((3, 0), torch.zeros(2, 3)))], r"w: the box at \[3, 0\] of shape \[2, 3\] does not lie within"),
        ([entry(Box((-1, 0), torch.zeros(1, 3)))], r"w: the box at \[-1, 0\]"),
        ([entry(Box((0,), torch.zeros(3)))], r"w: the box at \[0\] of shape \[3\]"),
        ([entry(Box((0, 0), torch.zeros(1, 3))), entry(Box((0, 0), torch.zeros(2, 3)))], r"two boxes .* at \[0, 0\]"),
        ([entry(), entry(shape=(3, 4))], r"w is named twice, as \(4, 3\) torch.float32 and as \(3, 4\)"),
        ([entry(dtype=torch.complex64)], "torch.complex64 cannot be stored"),
        ([entry(Box((0, 0), torch.zeros(4, 3).bfloat16()))], "is torch.bfloat16, but the entry says torch.float32"),
        ([entry(shape=(0, 3))], r"without elements, \[0, 3\]"),
    ],
)
def test_entries_that_make_no_sense_are_named(entries, message):
    with pytest.raises(CheckpointError, match=message):
        by_name(entries, exact_dtype=True)


def test_destinations_may_have_another_dtype():
    assert by_name([entry(Box((0, 0), torch.zeros(4, 3).bfloat16()))], exact_dtype=False)
