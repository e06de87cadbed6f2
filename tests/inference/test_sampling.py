import math

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from megatron.inference.sampling import Sampling, keep_top_k, keep_top_p, next_tokens, probabilities

P = [0.1, 0.4, 0.05, 0.3, 0.15]
LOGITS = torch.tensor([P]).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), [p * p / 0.285 for p in P]),
        (Sampling(temperature=2.0), [math.sqrt(p) / sum(map(math.sqrt, P)) for p in P]),
        (Sampling(temperature=0.0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=9), P),
        (Sampling(top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.8), [0, 8 / 17, 0, 6 / 17, 3 / 17]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0, 0]),
        # of the three likeliest, 8/17 + 6/17 = 0.82 is enough
        (Sampling(top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0]),
    ],
    ids=str,
)
def test_distributions_by_hand(sampling, expected):
    torch.testing.assert_close(probabilities(LOGITS, sampling), torch.tensor([expected], dtype=torch.float32))


def random_logits() -> torch.Tensor:
    return 3 * torch.randn(16, 200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 2, 17, 199, 200, 500])
def test_top_k_equals_hugging_face(k):
    logits = random_logits()
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_top_p_equals_hugging_face(p):
    logits = random_logits()
    kept = keep_top_p(logits, p)
    assert torch.equal(kept, TopPLogitsWarper(p)(None, logits))
    assert bool(kept.isfinite().any(dim=-1).all())


def test_a_draw_inverts_the_cumulative_distribution():
    edges = [0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.5499, 0.5501, 0.8499, 0.8501, 0.9999]
    drawn = next_tokens(LOGITS.expand(10, 5), Sampling(), torch.tensor(edges))
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_draws_never_leave_the_kept_tokens():
    largest = torch.tensor([1.0 - 2**-24, 0.0]).float()
    logits = torch.tensor([[-math.inf, 0.0, 1.0, 0.5, -math.inf]]).expand(2, 5)
    assert next_tokens(logits, Sampling(), largest).tolist() == [3, 1]
    assert next_tokens(logits, Sampling(top_k=1), largest).tolist() == [2, 2]


def test_frequencies_of_draws():
    count = 20000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = next_tokens(LOGITS.expand(count, 5), Sampling(), uniform)
    expected = torch.tensor(P)
    error = 5 * (expected * (1 - expected) / count).sqrt()
    assert bool(((drawn.bincount(minlength=5) / count - expected).abs() < error).all())


def test_greedy_takes_the_likeliest_whatever_the_number():
    assert (
        next_tokens(LOGITS.expand(3, 5), Sampling(temperature=0.0), torch.tensor([0.0, 0.5, 0.99])).tolist() == [1] * 3
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"top_p": math.nan}, "top-p is nan"),
    ],
    ids=str,
)
def test_unusable_values(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
