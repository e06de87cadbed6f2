"""A dense model with experts made of it: the same function at first, and a trainer that goes on from it."""

from pathlib import Path

import pytest
import saved_model
import tiny_run
import torch

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats.convert import Conversion, convert
from megatron.checkpoint.formats.native import read_native
from megatron.config import MoEConfig
from megatron.inference.load import find_checkpoint, load_model

FORMS = [{}, {"mlp_type": "residual"}, {"topk": 2}, {"topk": 2, "mlp_type": "residual", "expert_interval": 1}]


def run(load: list[Path], save: Path, **options: object) -> None:
    list(convert(Conversion([str(folder) for folder in load], str(save), "native", **options)))


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_the_loss_is_the_dense_models(tmp_path, form):
    saved = saved_model.save_model(tmp_path, MoEConfig())
    run([saved.folder], tmp_path / "moe", upcycle=True, num_experts=[4], **form)
    dense, sparse = load_model(find_checkpoint(saved.folder)), load_model(find_checkpoint(tmp_path / "moe"))
    tokens = torch.randint(122, (8, 49))
    before, after = (model(tokens[:, :-1], tokens[:, 1:]) for model in (dense, sparse))
    exact = form.get("topk") == 2
    torch.testing.assert_close(after.lm_loss, before.lm_loss, rtol=0, atol=1e-5 if exact else 2e-3)
    assert all((counts > 0).all() for counts in after.counts)  # the tokens are spread


@torch.no_grad()
def test_noise_makes_experts_differ(tmp_path):
    saved = saved_model.save_model(tmp_path, MoEConfig())
    run([saved.folder], tmp_path / "moe", upcycle=True, num_experts=[4], topk=2, expert_noise=0.1)
    name = "model.layers.1.mlp.experts.w1"
    w1 = read_native(tmp_path / "moe").tensors[name].read(None)
    dense = dict(saved.model.named_parameters())["layers.1.mlp.fc1.weight"].T
    for row in w1:
        assert float((row - dense).std() / dense.std()) == pytest.approx(0.1, rel=0.15)
    assert not torch.equal(w1[0], w1[1])


def test_experts_are_not_made_twice(tmp_path):
    saved = saved_model.save_model(tmp_path)
    with pytest.raises(CheckpointError, match="has experts already"):
        run([saved.folder], tmp_path / "moe", upcycle=True, num_experts=[4])


@torch.no_grad()
def test_the_average(tmp_path):
    saved = saved_model.save_model(tmp_path, MoEConfig())
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        run([saved.folder], folder, upcycle=True, num_experts=[4], expert_noise=0.5, seed=seed)
    run(folders, tmp_path / "mean")
    one, two, mean = (read_native(folder).tensors for folder in (*folders, tmp_path / "mean"))
    for name, lazy in mean.items():
        expected = (one[name].read(None).double() + two[name].read(None).double()) / 2
        torch.testing.assert_close(lazy.read(None).double(), expected, rtol=0, atol=1e-6)
    name = "model.layers.1.mlp.experts.w1"
    assert not torch.equal(mean[name].read(None), one[name].read(None))
    with pytest.raises(CheckpointError, match=r"differ in model\.layers\.1\.mlp"):
        run([folders[0], saved.folder], tmp_path / "no")


@pytest.mark.slow
def test_the_trainer_goes_on_from_it(tmp_path):
    tiny_run.make_tokenizer(tmp_path)
    tiny_run.make_dataset(tmp_path)
    changes = {"save": tmp_path / "dense", "log_file": tmp_path / "dense.jsonl"}
    done = tiny_run.train(1, tiny_run.flags(tmp_path, **changes))
    assert done.returncode == 0, done.stderr
    options = {"drop_optimizer": True, "reset_clock": True, "upcycle": True, "num_experts": [4]}
    run([tmp_path / "dense"], tmp_path / "moe", **options)
    changes = {"load": tmp_path / "moe", "save": tmp_path / "out", "num_experts": 4}
    done = tiny_run.train(1, tiny_run.flags(tmp_path, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_native(tmp_path / "out").has_optimizer
