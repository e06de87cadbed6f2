"""Averages, number formats, layouts, and what the inspection tells."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import saved_model
import torch

from megatron.checkpoint import CheckpointError, save
from megatron.config import MoEConfig
from megatron.conversion.contents import Contents, is_learned
from megatron.conversion.convert import convert
from megatron.conversion.inspect import in_words, inspect
from megatron.conversion.job import Conversion
from megatron.conversion.native import read_native, write_native
from megatron.moe.balancing import learned_buffers


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> saved_model.SavedModel:
    return saved_model.save_model(tmp_path_factory.mktemp("run"))


def with_moments(contents: Contents) -> Contents:
    moments = {
        name.replace("model.", prefix, 1): lazy
        for prefix in ("exp_avg.", "exp_avg_sq.")
        for name, lazy in contents.tensors.items()
        if not is_learned(name)
    }
    meta = contents.meta | {"optimizer": {"adam_step": 3}}
    return dataclasses.replace(contents, tensors=dict(contents.tensors) | moments, meta=meta)


def run(load: Path | None, save: Path, target: str = "native", **options: object) -> Contents:
    list(convert(Conversion(load and str(load), str(save), target, **options)))
    return read_native(save)


def test_average_is_the_mean_of_the_weights(saved, tmp_path):
    one = with_moments(read_native(saved.folder))
    factors = (1.0, 2.0, 4.5)
    for number, factor in enumerate(factors):
        tensors = {name: lazy.map(lambda tensor, factor=factor: tensor * factor) for name, lazy in one.tensors.items()}
        clock = {"seq_length": 48, "samples": 10 * number, "steps": number, "skipped": 0}
        write_native(
            dataclasses.replace(one, tensors=tensors, step=number, meta=one.meta | {"clock": clock}),
            tmp_path / str(number),
        )
    mean = run(None, tmp_path / "mean", average=[str(tmp_path / n) for n in "021"])
    assert (mean.step, mean.meta["clock"]["samples"], mean.has_optimizer) == (2, 20, False)
    assert mean.meta["optimizer"] is None
    for name, lazy in mean.tensors.items():
        expected = one.tensors[name].read(None).double() * 2.5
        torch.testing.assert_close(lazy.read(None).double(), expected, rtol=1e-6, atol=1e-7)
    other = saved_model.save_model(tmp_path, MoEConfig(num_experts=(2,)))
    with pytest.raises(CheckpointError, match=r"different models .* model\.layers\.1\.mlp\.router\.weight \[4, 32\]"):
        run(None, tmp_path / "no", average=[str(saved.folder), str(other.folder)])
    with pytest.raises(ValueError, match="give two checkpoints or more"):
        run(None, tmp_path / "no", average=[str(saved.folder)])
    assert not (tmp_path / "no").exists()


def test_optimizer_is_dropped_and_weights_are_cast(saved, tmp_path):
    write_native(with_moments(read_native(saved.folder)), tmp_path / "full")
    cast = run(tmp_path / "full", tmp_path / "cast", dtype="bf16")
    assert {lazy.dtype for name, lazy in cast.tensors.items() if name.startswith("model.")} == {torch.bfloat16}
    assert {lazy.dtype for name, lazy in cast.tensors.items() if name.startswith("exp_")} == {torch.float32}
    lean = run(tmp_path / "full", tmp_path / "lean", drop_optimizer=True)
    assert list(lean.tensors) == [name for name in cast.tensors if name.startswith("model.")]
    assert lean.meta["optimizer"] is None
    for name, lazy in lean.tensors.items():
        assert torch.equal(lazy.read(None).bfloat16(), cast.tensors[name].read(None)), name


@pytest.mark.parametrize("method", saved_model.BALANCING)
def test_what_balancers_learned_is_carried_in_fp32(tmp_path, method):
    saved = saved_model.save_model(tmp_path, dataclasses.replace(saved_model.EXPERTS, **saved_model.BALANCING[method]))
    before = read_native(saved.folder)
    learned = {"model." + name: buffer for name, buffer in learned_buffers(saved.model).items()}
    assert len(learned) == (1 if method == "global_aux_loss" else 2)
    write_native(with_moments(before), tmp_path / "full")
    for options in ({"dtype": "bf16"}, {"drop_optimizer": True}, {"tp": 2, "ep": [4]}):
        new = run(tmp_path / "full", tmp_path / next(iter(options)), **options)
        for name, buffer in learned.items():
            torch.testing.assert_close(new.tensors[name].read(None), buffer, rtol=0, atol=0)
    tripled = {name: lazy.map(lambda tensor: 3 * tensor) for name, lazy in before.tensors.items()}
    write_native(dataclasses.replace(before, tensors=tripled), tmp_path / "tripled")
    mean = run(None, tmp_path / "mean", average=[str(saved.folder), str(tmp_path / "tripled")])
    for name, buffer in learned.items():
        torch.testing.assert_close(mean.tensors[name].read(None), 2 * buffer)
    about = inspect(str(tmp_path / "dtype"), verify=True)
    assert about["parameters"] == sum(p.numel() for p in saved.model.parameters())
    for name, buffer in learned.items():
        assert about["tensors"][name] == {"shape": list(buffer.shape), "dtype": "float32"}
    name = next(iter(learned))
    less = dataclasses.replace(before, tensors={n: lazy for n, lazy in before.tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        write_native(less, tmp_path / "less")
    plain = saved_model.save_model(tmp_path / "full")
    with pytest.raises(CheckpointError, match=rf"different models .* {name} \[4\] and None"):
        run(None, tmp_path / "no", average=[str(saved.folder), str(plain.folder)])


def test_a_run_that_goes_on_keeps_the_checkpoint_that_is_read(saved, tmp_path):
    """Its tensors are read one after another, while the run saves others and deletes old ones."""
    (step,) = saved.folder.glob("step_*")
    old = tmp_path / "run" / step.name
    shutil.copytree(step, old)
    words = convert(Conversion(str(tmp_path / "run"), str(tmp_path / "new"), "native"))
    assert str(old) in next(words)
    save(tmp_path / "run", 900, [], {}, keep_last=1)
    assert old.exists()
    list(words)
    assert read_native(tmp_path / "new").tensors.keys() == read_native(saved.folder).tensors.keys()
    save(tmp_path / "run", 901, [], {}, keep_last=1)
    assert not old.exists()


def test_a_layout_that_cannot_resume_is_refused_at_once(saved, tmp_path):
    def fails(message: str, load: Path = saved.folder, **layout: object) -> None:
        with pytest.raises(ValueError, match=message):
            run(load, tmp_path / "new", **layout)
        assert not (tmp_path / "new").exists()

    fails("--tp 3: the padded vocabulary of 128 cannot be shared evenly", tp=3)
    fails("--tensor-model-parallel-size 8 must divide --num-attention-heads 4", tp=8)
    fails(r"--moe-expert-parallel-size 3 must divide the 4 experts of a layer .*; use 2 or 4", ep=[3])
    fails("--pipeline-model-parallel-size 3", pp=3)
    fails("--tp 0, --pp 1, --ep 1: use 1 or more", tp=0)
    dense = saved_model.save_model(tmp_path, MoEConfig())
    fails("a dense model has no experts to share", dense.folder, ep=[2])
    with pytest.raises(ValueError, match="have no meaning for --to hf"):
        run(saved.folder, tmp_path / "new", "hf", tp=2)
    with pytest.raises(ValueError, match="--num-experts: of --upcycle"):
        run(saved.folder, tmp_path / "new", num_experts=[8])
    new = run(saved.folder, tmp_path / "new", tp=2, pp=2, ep=[4])
    about = inspect(str(tmp_path / "new"), verify=True)
    wrote = about["written_by"]
    assert (wrote["tensor_parallel"], wrote["pipeline_stages"], wrote["expert_parallel"]) == (2, 2, [4])
    before = read_native(saved.folder)
    for name, lazy in new.tensors.items():
        assert torch.equal(lazy.read(None), before.tensors[name].read(None)), name


def test_inspection_tells_what_is_there(saved, tmp_path):
    about = json.loads(json.dumps(inspect(str(saved.folder), verify=False)))
    assert about["parameters"] == sum(p.numel() for p in saved.model.parameters())
    assert about["tensors"]["model.layers.1.mlp.experts.w1"] == {"shape": [4, 32, 128], "dtype": "float32"}
    assert about["model"]["experts"] == [1, 4]
    assert not about["optimizer"]
    text = in_words(about)
    assert "checksums not verified" in text
    assert "model.layers.1.mlp.experts.w1" in text
    list(convert(Conversion(str(saved.folder), str(tmp_path / "theirs"), "megatron-deepspeed")))
    with pytest.raises(CheckpointError, match="theirs is Megatron-DeepSpeed's"):
        inspect(str(tmp_path / "theirs"), verify=False)
    copy = write_native(read_native(saved.folder), tmp_path / "copy")
    data = copy / "data-00000.safetensors"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    inspect(str(tmp_path / "copy"), verify=False)
    with pytest.raises(CheckpointError, match="another SHA-256"):
        inspect(str(tmp_path / "copy"), verify=True)
