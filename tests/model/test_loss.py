import pytest
import torch
import torch.nn.functional as F

from megatron.model import loss as loss_module
from megatron.model.loss import cross_entropy


@pytest.fixture(params=[1, 5, 1000], ids=lambda rows: f"{rows}_rows_a_chunk")
def rows(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", request.param * 11)


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 7, 11, generator=g)).to(dtype).requires_grad_()
    return logits, torch.randint(11, (2, 7), generator=g), (torch.rand(2, 7, generator=g) > 0.4).float()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch_in_value_and_gradient(dtype):
    logits, labels, mask = inputs(dtype)
    actual = cross_entropy(logits, labels, mask)
    (3 * actual).backward()
    copy = logits.detach().float().requires_grad_()
    per_token = F.cross_entropy(copy.transpose(1, 2), labels, reduction="none")
    expected = (per_token * mask).sum() / mask.sum()
    (3 * expected).backward()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        logits.grad, copy.grad.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7
    )
    assert not logits.grad[mask == 0].any()


@pytest.mark.usefixtures("rows")
def test_gradcheck():
    logits, labels, mask = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, mask), logits)


def test_no_mask_counts_every_token():
    logits, labels, _ = inputs()
    torch.testing.assert_close(cross_entropy(logits, labels), cross_entropy(logits, labels, torch.ones(2, 7)))
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_a_mask_of_zeros_gives_zero_and_no_gradient():
    logits, labels, mask = inputs()
    loss = cross_entropy(logits, labels, mask.zero_())
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_near_certain_label_does_not_cancel(dtype):
    """p = 1 - 1e-5 is 1 in bf16, so that p - 1 would be 0."""
    logits = torch.tensor([[[11.5, 0.0]]], dtype=dtype, requires_grad=True)
    cross_entropy(logits, torch.tensor([[0]])).backward()
    expected = -1.0 / (1.0 + torch.exp(torch.tensor(11.5))).item()
    assert logits.grad[0, 0, 0].item() == pytest.approx(expected, rel=1e-2)


def test_large_logits_stay_finite():
    logits = torch.tensor([[[3e4, -3e4, 0.0]]], dtype=torch.float16, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == pytest.approx(6e4, rel=1e-3)
    assert logits.grad.isfinite().all()


def test_shapes_must_fit():
    logits, labels, _ = inputs()
    with pytest.raises(ValueError, match=r"\(2, 7, 11\), labels \(2, 7\) and loss mask \(2, 6\)"):
        cross_entropy(logits, labels, torch.ones(2, 6))
