"""Which corpus each sequence of a blend is taken from."""

import numpy as np
import pytest

from megatron.data.blend_order import BlendOrder

COUNT = 150_000  # more than two blocks


@pytest.mark.parametrize(
    "weights", [[1], [3, 1], [1, 1, 1], [0.5, 1e-6, 7], np.random.default_rng(0).random(37).tolist()]
)
def test_each_corpus_is_read_in_its_order_and_by_its_share(weights):
    order = BlendOrder(weights)
    corpora, sequences = np.array([order[position] for position in range(COUNT)]).T
    shares = np.array(weights) / sum(weights)
    for corpus in range(len(weights)):
        taken = sequences[corpora == corpus]
        np.testing.assert_array_equal(taken, np.arange(len(taken)))
    for count in (0, 1, 2, 3, 100, 65_535, 65_536, 65_537, COUNT):
        found = np.bincount(corpora[:count], minlength=len(weights))
        assert order.counts(count) == found.tolist()
        assert np.abs(found - shares * count).max() <= 1


def test_places_far_away_are_those_that_reading_on_would_come_to():
    order = BlendOrder([2, 5])
    near = [order[position] for position in range(65_530, 65_600)]
    assert [BlendOrder([2, 5])[position] for position in range(65_530, 65_600)] == near
    far = 146_000_000
    assert sum(order.counts(far)) == far
    corpus, sequence = order[far]
    assert sequence == order.counts(far)[corpus]
