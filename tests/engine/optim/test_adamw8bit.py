"""AdamW with 8-bit moments: an update is AdamW's, moments are rounded as stated, whatever the pieces."""

import pytest
import torch

from megatron.checkpoint import Box, data_of, flat_boxes
from megatron.engine.optim import adamw8bit
from megatron.engine.optim.adamw8bit import AdamW8bit, QuantizedSlice

pytest.importorskip("torchao", reason="needs the extra [8bit]")

NUMEL = 20 * 256 + 37
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def gradient(step: int, numel: int = NUMEL) -> torch.Tensor:
    """Of numbers that differ in size up to a hundredfold, each having a size of its own."""
    sizes = 10.0 ** torch.randint(-2, 1, (numel,), generator=torch.Generator().manual_seed(99))
    return torch.randn(numel, generator=torch.Generator().manual_seed(step)) * sizes


def made(numel: int = NUMEL) -> tuple[AdamW8bit, torch.Tensor]:
    flat = torch.nn.Parameter(torch.linspace(-1, 1, numel))
    group = {"params": [flat], "weight_decay": 0.1, "matrices": True}
    adam = AdamW8bit([group], compiled=True, **OPTIONS)
    adam.state[flat].update(adam.new_state(flat, adam.param_groups[0]))
    return adam, flat


def train(adam: AdamW8bit, flat: torch.Tensor, steps: int) -> None:
    for step in range(steps):
        flat.grad = gradient(step, flat.numel())
        adam.step()


def moments(adam: AdamW8bit, flat: torch.Tensor) -> list[torch.Tensor]:
    return [adam.state[flat][name].decode(0, flat.numel()) for name in ("exp_avg", "exp_avg_sq")]


def kept(beta2: float, share: float) -> float:
    """What is left, after 200 gradients of 0, of a second moment that was a ``share`` of its block's largest one, which
    large gradients keep up. In fp32 it would be beta2^200, 0.13 or less."""
    numel = adamw8bit.FEWEST
    flat = torch.nn.Parameter(torch.zeros(numel))
    adam = AdamW8bit([{"params": [flat], "matrices": True}], compiled=True, lr=1e-3, betas=(0.9, beta2))
    adam.state[flat].update(adam.new_state(flat, adam.param_groups[0]))
    adam.state[flat]["exp_avg_sq"].load_buffer().fill_(share)[::256] = 1.0
    adam.finish_loading()
    before = moments(adam, flat)[1][1]
    for _ in range(200):
        flat.grad = torch.zeros(numel)
        flat.grad[::256] = 1.0
        adam.step()
    return float(moments(adam, flat)[1][1] / before)


@pytest.mark.parametrize(("beta2", "share"), [(0.95, 0.1), (0.99, 1.0)])
def test_moments_fall_above_the_bound_and_not_below_it(beta2: float, share: float):
    assert kept(beta2, 0.9 * adamw8bit.cannot_fall(beta2, signed=False)) == 1.0
    assert kept(beta2, share) < 0.8


def test_betas_whose_moments_cannot_follow_are_warned_of(caplog):
    adamw8bit.warn_of_slow_decay((0.9, 0.95))
    assert not caplog.records
    adamw8bit.warn_of_slow_decay((0.9, 0.99))
    (record,) = caplog.records
    assert "0.07 with --adam-beta2 0.99." in record.getMessage()
    assert "--adam-beta1" not in record.getMessage()


def allowed(exact: torch.Tensor) -> torch.Tensor:
    """Half the widest gap between levels, 1/64 of a block's largest number, with its end for signed numbers."""
    padded = torch.nn.functional.pad(exact.abs(), (0, -exact.numel() % 256)).view(-1, 256)
    error = padded.amax(1, keepdim=True).expand(-1, 256).reshape(-1)[: exact.numel()] / 128
    error[NUMEL // 256 * 256 :] = 1e-6  # what is behind the last whole block is fp32
    return error


def test_the_first_update_is_that_of_adamw_in_float64_and_its_moments_are_within_half_a_level():
    adam, flat = made()
    exact = torch.nn.Parameter(flat.detach().double())
    reference = torch.optim.AdamW([exact], weight_decay=0.1, **OPTIONS)
    exact.grad = gradient(0).double()
    reference.step()
    train(adam, flat, 1)
    torch.testing.assert_close(flat.double(), exact, rtol=1e-6, atol=1e-6)
    for found, name in zip(moments(adam, flat), ("exp_avg", "exp_avg_sq"), strict=True):
        expected = reference.state[exact][name].float()
        assert bool(((found - expected).abs() <= allowed(expected)).all())
        assert not torch.equal(found, expected), "these are not rounded at all"
    assert adam.state[flat]["step"] == 1


def test_many_updates_stay_close_to_adamw():
    adam, flat = made()
    start = flat.detach().clone()
    exact = torch.nn.Parameter(flat.detach().clone())
    reference = torch.optim.AdamW([exact], weight_decay=0.1, **OPTIONS)
    for step in range(20):
        exact.grad = gradient(step)
        reference.step()
    train(adam, flat, 20)
    assert 0 < (flat - exact).detach().norm() < 0.1 * (exact - start).detach().norm()


def test_chunks_and_parts_change_nothing(monkeypatch):
    whole, flat = made()
    train(whole, flat, 3)
    monkeypatch.setattr(adamw8bit, "EAGER_CHUNK", 1536)
    monkeypatch.setattr(adamw8bit, "PART", 512)
    cut, pieces = made()
    train(cut, pieces, 3)
    assert [chunk.numel() for chunk in cut.state[pieces]["exp_avg"].chunks] == [1536, 1536, 1536, 512, 37]
    assert torch.equal(flat, pieces)
    for mine, theirs in zip(moments(cut, pieces), moments(whole, flat), strict=True):
        assert torch.equal(mine, theirs)
        for start, numel in ((0, 1), (255, 2), (1000, 3000), (4607, 550), (5119, 38), (NUMEL - 1, 1), (7, 0)):
            stretch = cut.state[pieces]["exp_avg"].decode(start, numel)
            assert torch.equal(stretch, moments(cut, pieces)[0][start : start + numel])


def test_few_numbers_have_fp32_moments_and_the_update_of_adamw():
    adam, flat = made(1000)
    exact = torch.nn.Parameter(flat.detach().clone())
    reference = torch.optim.AdamW([exact], weight_decay=0.1, **OPTIONS)
    for step in range(5):
        exact.grad = gradient(step, 1000)
        reference.step()
    train(adam, flat, 5)
    torch.testing.assert_close(flat, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments(adam, flat)[1], reference.state[exact]["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_what_is_loaded_is_encoded_and_decoded_box_by_box():
    adam, flat = made()
    moment = adam.state[flat]["exp_avg"]
    shape, start, numel = (7, 5, 9), 11, 300
    values = torch.randn(numel, generator=torch.Generator().manual_seed(3))
    moment.narrow(0, 100, numel).load_buffer().copy_(values)
    adam.finish_loading()
    assert not moment.decode(0, 100).any()
    assert not moment.decode(100 + numel, NUMEL - 100 - numel).any()

    def cut(stretch: torch.Tensor) -> list[Box]:
        found = flat_boxes(shape, start, stretch.numel())
        return [Box(o, stretch.narrow(0, at, torch.Size(s).numel()).view(s)[..., 1:]) for o, s, at in found]

    decoded, boxes, plain = moment.decode(100, numel), moment.narrow(0, 100, numel).boxes(cut), cut(values)
    assert float((decoded - values).abs().max()) <= float(values.abs().max()) / 128
    assert len(boxes) == len(plain) > 2
    for box, exact in zip(boxes, cut(decoded), strict=True):
        assert box.offsets == exact.offsets
        assert (box.tensor.shape, box.tensor.dtype) == (exact.tensor.shape, torch.float32)
        assert torch.equal(data_of(box.tensor), exact.tensor)
    again = moment.decode(0, NUMEL)
    adam.finish_loading()  # nothing new was loaded
    assert torch.equal(moment.decode(0, NUMEL), again)


def test_a_slice_outside_of_the_moment_is_an_error():
    adam, flat = made()
    moment = adam.state[flat]["exp_avg"]
    assert isinstance(moment.narrow(0, NUMEL - 1, 1), QuantizedSlice)
    for start, numel in ((NUMEL, 1), (-1, 1), (3, -1)):
        for take in (moment.decode, lambda *stretch: moment.narrow(0, *stretch)):
            with pytest.raises(ValueError, match=f"among the moment's {NUMEL} numbers"):
                take(start, numel)
    with pytest.raises(ValueError, match="one dimension"):
        moment.narrow(1, 0, 1)


def test_groups_that_do_not_ask_for_it_have_fp32_moments():
    flat, vector = (torch.nn.Parameter(torch.ones(8192)) for _ in range(2))
    adam = AdamW8bit(
        [{"params": [flat], "matrices": True}, {"params": [vector], "matrices": False}], compiled=True, **OPTIONS
    )
    adam.state[flat].update(adam.new_state(flat, adam.param_groups[0]))
    both = adam.param_groups
    flat.grad, vector.grad = gradient(1, 8192), gradient(1, 8192)
    adam.step()
    adam.param_groups = both[1:]  # as DeepSpeed's fp16 optimizer steps: group by group
    adam.step()
    assert float(adam.state[flat]["step"]) == 1
    assert float(adam.state[vector]["step"]) == 2
    torch.testing.assert_close(adam.state[vector]["exp_avg"], gradient(1, 8192) * 0.19)
