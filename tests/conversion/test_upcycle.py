"""A dense model that got experts computes what it did before, and its moments belong to its gradients."""

import dataclasses

import pytest
import saved_model
import torch

from megatron.checkpoint import CheckpointError
from megatron.config import MoEConfig
from megatron.conversion.contents import Contents, Lazy
from megatron.conversion.native import read_native, write_native
from megatron.conversion.upcycle import upcycle
from megatron.inference.load import find_checkpoint, load_model
from megatron.model.gpt import GPTModel
from megatron.model.loss import LossSums
from megatron.moe.balancing import learned_buffers

MOMENTS = ("exp_avg.", "exp_avg_sq.")
SHAPE = dataclasses.replace(saved_model.SHAPE, num_layers=4, hidden_dropout=0.0, attention_dropout=0.0)
NO_DROPS = {"moe_token_dropping": False}
EXPERTS = {
    "top1": MoEConfig(num_experts=(4,), **NO_DROPS),
    "top1_pyramid_residual": MoEConfig(num_experts=(4, 8), mlp_type="residual", **NO_DROPS),
    "top2": MoEConfig(num_experts=(4,), topk=2, expert_interval=1, **NO_DROPS),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Contents:
    """A dense checkpoint with optimizer state."""
    contents = read_native(saved_model.save_model(tmp_path_factory.mktemp("dense"), MoEConfig(), SHAPE).folder)
    generator = torch.Generator().manual_seed(1)
    tensors = dict(contents.tensors)
    for prefix in MOMENTS:
        for name, lazy in contents.tensors.items():
            value = torch.rand(lazy.shape, generator=generator) + 0.5
            tensors[name.replace("model.", prefix, 1)] = Lazy(
                lazy.shape, torch.float32, lambda row, value=value: value if row is None else value[row]
            )
    return dataclasses.replace(contents, tensors=tensors, meta=contents.meta | {"optimizer": {"adam_step": 3}})


def model_of(contents: Contents) -> GPTModel:
    config = contents.config
    moe = dataclasses.replace(config.moe, **NO_DROPS, moe_loss_coeff=0.0)  # the loss is the LM loss alone
    model = GPTModel(config.model, moe, contents.meta["vocab_size"])
    model.load_state_dict({n: contents.tensors["model." + n].read(None) for n, _ in model.named_parameters()})
    return model.train()


def losses(model: GPTModel) -> tuple[torch.Tensor, LossSums]:
    tokens = torch.randint(122, (4, 49), generator=torch.Generator().manual_seed(2))
    return model.loss(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("kind", EXPERTS)
def test_step_0_is_the_dense_models(dense, kind):
    contents = upcycle(dense, EXPERTS[kind])
    before, after = model_of(dense), model_of(contents)
    (loss, _), (new, sums) = losses(before), losses(after)
    assert 1 < float(loss) < 50
    assert abs(float(new) - float(loss)) < 1e-5
    for counts in sums.counts:
        assert (counts > 0).sum() > len(counts) / 2  # the experts share the tokens
    loss.backward()
    new.backward()
    theirs = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if ".experts." not in name and name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
        if ".experts." in name:
            kind_of = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}[name[-2:]]
            source = name[: -len("experts.w1")] + kind_of
            # what moments were multiplied by is what the gradient, added up over experts, is multiplied by
            first, second = (
                float(contents.tensors[m + name].read(0).sum() / dense.tensors[m + source].read(None).sum())
                for m in MOMENTS
            )
            assert second == pytest.approx(first**2, rel=1e-4)
            gradient = theirs[source].grad
            gradient = gradient.T if gradient.dim() == 2 else gradient
            torch.testing.assert_close(parameter.grad.sum(0), first * gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", saved_model.BALANCING)
def test_balancers_start_anew(dense, tmp_path, method):
    moe = dataclasses.replace(EXPERTS["top1"], **saved_model.BALANCING[method])
    write_native(upcycle(dense, moe), tmp_path)
    source = find_checkpoint(tmp_path)
    fresh = GPTModel(source.config.model, moe, source.meta["vocab_size"])
    torch.testing.assert_close(learned_buffers(load_model(source)), learned_buffers(fresh), rtol=0, atol=0)


def test_noise_parts_the_experts_and_follows_from_the_seed(dense, tmp_path):
    moe = EXPERTS["top1"]
    name = "model.layers.1.mlp.experts.w1"
    plain, noisy = upcycle(dense, moe), upcycle(dense, moe, noise=0.1, seed=7)
    w1 = noisy.tensors[name].read(None)
    assert not torch.equal(w1[0], w1[1])
    difference = w1 - plain.tensors[name].read(None)
    assert float(difference.std() / plain.tensors[name].read(0).std()) == pytest.approx(0.1, rel=0.05)
    write_native(noisy, tmp_path / "noisy")
    again = upcycle(dense, moe, noise=0.1, seed=7)
    for name, lazy in read_native(tmp_path / "noisy").tensors.items():
        assert torch.equal(lazy.read(None), again.tensors[name].read(None)), name
    assert not torch.equal(upcycle(dense, moe, noise=0.1, seed=8).tensors[name].read(None), w1)


def test_what_does_not_fit_is_refused(dense):
    with pytest.raises(ValueError, match="needs --num-experts of 2 or more"):
        upcycle(dense, MoEConfig())
    with pytest.raises(ValueError, match="--topk 3 must not exceed the 2 experts"):
        upcycle(dense, MoEConfig(num_experts=(2,), topk=3))
    with pytest.raises(ValueError, match="--num-experts lists 3 numbers"):
        upcycle(dense, MoEConfig(num_experts=(2, 2, 2)))
    with pytest.raises(ValueError, match="--upcycle-noise nan: use 0 or more"):
        upcycle(dense, EXPERTS["top1"], noise=float("nan"))
    with pytest.raises(CheckpointError, match="has experts already"):
        upcycle(upcycle(dense, EXPERTS["top1"]), EXPERTS["top1"])
