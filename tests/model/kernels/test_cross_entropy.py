"""The cross-entropy kernel against plain torch in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from megatron.model.kernels import cross_entropy as module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "V"), [(5, 70), (1, 4096), (3, 9000), (2, 1)])
def test_losses_and_gradients_are_those_of_float64(T, V, dtype):
    generator = torch.Generator().manual_seed(V)
    logits = (3 * torch.randn(T, V, generator=generator)).to(DEVICE, dtype)
    logits[0, 0] = 12.0  # nearly certain: p - 1 cancels
    labels = torch.randint(0, V, (T,), generator=generator).to(DEVICE)
    labels[0] = 0
    weights = torch.rand(T, generator=generator).to(DEVICE)
    exact, mine = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected, found = module.reference(exact, labels), module.cross_entropy(mine.clone(), labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    # at a nearly certain label the loss has the absolute error of fp32 logits near 12, and so has p - 1
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=2e-6)


def test_a_logit_of_minus_infinity_and_no_tokens():
    logits = torch.randn(2, 5000, device=DEVICE)
    logits[:, 10:4500] = -torch.inf
    labels = torch.tensor([3, 4700], device=DEVICE)
    found = module.cross_entropy(logits.clone(), labels)
    torch.testing.assert_close(found, module.reference(logits, labels))
    assert module.cross_entropy(logits[:0], labels[:0]).shape == (0,)
