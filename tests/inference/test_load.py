import dataclasses

import pytest
import saved_model
import torch

from megatron.checkpoint import CheckpointError
from megatron.config import MoEConfig
from megatron.inference.load import choose_device, find_checkpoint, load_model, load_tokenizer
from megatron.moe.balancing import learned_buffers, learners

BIASED = dataclasses.replace(saved_model.EXPERTS, **saved_model.BALANCING["quantile_balancing"])


@pytest.fixture(scope="module", params=[MoEConfig(), saved_model.EXPERTS, BIASED], ids=["dense", "moe", "biased"])
def saved(request, tmp_path_factory):
    return saved_model.save_model(tmp_path_factory.mktemp("run"), request.param)


def test_the_model_is_the_saved_one(saved):
    source = find_checkpoint(saved.folder)
    model = load_model(source)
    torch.testing.assert_close(model.state_dict(), saved.model.state_dict(), rtol=0, atol=0)
    assert not model.training
    one = torch.randint(100, (1, 9))
    with torch.no_grad():  # one sequence: with the saved model's evaluation capacity some token may be dropped
        expected = saved_model.GPTModel(
            saved.config.model, dataclasses.replace(saved.config.moe, moe_eval_capacity_factor=None), 128
        ).eval()
        expected.load_state_dict(saved.model.state_dict())
        torch.testing.assert_close(model(one), expected(one), rtol=0, atol=0)


def test_no_token_is_dropped(saved):
    model, tokens = load_model(find_checkpoint(saved.folder)), torch.full((1, 40), 7)
    _, sums = model.loss(tokens, tokens)
    assert int(sums.dropped.sum()) == 0
    _, dropping = saved.model.loss(tokens, tokens)
    assert bool(saved.config.moe.enabled) == (int(dropping.dropped.sum()) > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_number_formats(saved, dtype):
    model = load_model(find_checkpoint(saved.folder), dtype=dtype)
    rounded = {name: value.to(dtype) for name, value in saved.model.named_parameters()}
    expected = rounded | learned_buffers(saved.model)  # which stay in fp32
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


@torch.no_grad()
def test_biases_decide_and_nothing_is_observed(tmp_path):
    model = load_model(find_checkpoint(saved_model.save_model(tmp_path, BIASED).folder))
    tokens = torch.randint(100, (2, 40))
    before = [each.statistics.clone() for each in learners(model)]
    assert len(before) == 2
    biased = saved_model.choices_of(model, tokens)
    assert all(torch.equal(each.statistics, old) for each, old in zip(learners(model), before, strict=True))
    assert (saved_model.choices_of(saved_model.without_biases(model), tokens) != biased).any()


def test_a_checkpoint_folder_itself(saved):
    latest = find_checkpoint(saved.folder).path
    assert latest.parent == saved.folder
    assert find_checkpoint(latest).path == latest


def test_no_checkpoint(saved, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist; expected the --save folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        find_checkpoint(tmp_path)


def test_the_tokenizer_must_be_the_one_of_training(saved, tmp_path):
    source = find_checkpoint(saved.folder)
    assert load_tokenizer(source).encode("w3 w5") == [3, 5]
    moved = tmp_path / "moved.json"
    moved.write_bytes(saved.tokenizer_file.read_bytes())
    assert load_tokenizer(source, tokenizer_model=str(moved), vocab_file=None).encode("w3 w5") == [3, 5]
    moved.write_text(moved.read_text().replace('"w3"', '"v3"'))
    with pytest.raises(ValueError, match=r"fingerprint \w{12}, but .* was trained with \w{12}.*--tokenizer-model"):
        load_tokenizer(source, tokenizer_model=str(moved))


def test_devices():
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "meta", "mps"):  # the last two are torch's, but no model runs there
        with pytest.raises(ValueError, match=f"--device {name} is not known; expected cpu, cuda or cuda:N"):
            choose_device(name)
    with pytest.raises(ValueError, match="torch finds"):
        choose_device("cuda:99")
