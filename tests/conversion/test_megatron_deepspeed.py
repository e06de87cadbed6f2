"""Checkpoints that DeepSpeed's own engine and MoE layer wrote, with tensor and expert parallelism."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import saved_model
import tiny_run
import torch
from checkpoint.test_memory import extra

from megatron.checkpoint import CheckpointError
from megatron.config import ModelConfig, MoEConfig, RunConfig
from megatron.config.run import to_dict
from megatron.conversion.contents import Contents, Lazy, is_learned, parameter_shapes
from megatron.conversion.convert import convert
from megatron.conversion.inspect import inspect
from megatron.conversion.job import Conversion
from megatron.conversion.megatron_deepspeed import write_megatron_deepspeed
from megatron.conversion.native import new_meta, read_native, write_native
from megatron.inference.load import find_checkpoint, load_model

JOB = Path(__file__).with_name("deepspeed_job.py")


MODELS = {
    "residual": MoEConfig(num_experts=(4,), mlp_type="residual"),
    "top2": MoEConfig(num_experts=(4,), topk=2, moe_loss_coeff=0.02, moe_z_loss_coeff=0.001),
    "dense": MoEConfig(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Our models; and a folder with what a job of two processes saved of the first of them, what we wrote of all for
    two tensor-parallel processes, and the logits that the job computed after it loaded that."""
    folder = tmp_path_factory.mktemp("deepspeed")
    models = {}
    for name, moe in MODELS.items():
        (folder / name).mkdir()
        models[name] = saved_model.save_model(folder / name, moe)
        run(models[name], models[name].folder, folder / "written" / name, "megatron-deepspeed", tp=2)
        torch.save(dict(models[name].model.state_dict()), folder / f"{name}.pt")
    torch.save(torch.randint(122, (2, 48)), folder / "written" / "tokens.pt")
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*starter, str(JOB), str(folder / "residual.pt"), str(folder)],
        env=tiny_run.environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return models, folder


def run(
    model: saved_model.SavedModel, source: Path, save: Path, target: str = "native", **options: object
) -> list[str]:
    options |= {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(model.tokenizer_file)}
    return list(convert(Conversion(str(source), str(save), target, **options)))


@pytest.mark.parametrize("saved_as", ["v0", "v1", "v3", "cut", "tp2", "pp2", "pp2_experts"])
def test_weights_are_ours_again(written, tmp_path, saved_as):
    saved, folder = written[0]["dense" if saved_as in ("tp2", "pp2") else "residual"], written[1]
    run(saved, folder / saved_as, tmp_path / "native")
    back = read_native(tmp_path / "native")
    expected = saved.model.state_dict()
    assert len(back.tensors) == len(list(saved.model.parameters()))
    for name, parameter in expected.items():
        assert torch.equal(back.tensors["model." + name].read(None), parameter), name
    config = back.config
    kept = ("num_experts", "mlp_type")
    assert config.model.num_attention_heads == 4
    assert all(getattr(config.moe, name) == getattr(saved.config.moe, name) for name in kept)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_deepspeed_computes_the_same_from_what_we_wrote(written, name):
    models, folder = written
    logits = models[name].model(torch.load(folder / "written" / "tokens.pt"))
    assert logits.abs().max() > 1
    torch.testing.assert_close(torch.load(folder / "written" / f"{name}.logits.pt"), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(written, tmp_path, name):
    """With another number of tensor-parallel ranks than the job's, and experts cut too."""
    saved = written[0][name]
    before = read_native(saved.folder)
    parallel = dataclasses.replace(before.config.parallel, enable_expert_tensor_parallelism=True)
    cut = dataclasses.replace(
        before, meta=before.meta | {"config": to_dict(dataclasses.replace(before.config, parallel=parallel))}
    )
    write_native(cut, tmp_path / "cut")
    told = run(saved, tmp_path / "cut", tmp_path / "theirs", "megatron-deepspeed", tp=4)
    assert any("moe_z_loss_coeff 0.001" in line for line in told) == (name == "top2")
    expert = tmp_path / "theirs" / "global_step3" / "layer_0_expert_3_mp_rank_03_model_states.pt"
    if saved.config.moe.enabled:
        inner = "language_model.encoder.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.3.dense_h_to_4h.weight"
        assert torch.load(expert)[inner].shape == (128 // 4, 32)
    assert (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "latest", "latest_checkpointed_iteration.txt", "global_step3"
    }  # fmt: skip
    run(saved, tmp_path / "theirs", tmp_path / "back")
    after = read_native(tmp_path / "back")
    assert list(after.tensors) == list(before.tensors)
    for tensor, lazy in before.tensors.items():
        assert torch.equal(lazy.read(None), after.tensors[tensor].read(None)), tensor
    shape = dataclasses.replace(before.config.model, ffn_hidden_size=128, max_position_embeddings=48)
    assert after.config.model == shape
    coefficients = {"moe_z_loss_coeff": 0.0, "moe_loss_coeff": before.config.moe.aux_loss_coeff}
    expected = dataclasses.replace(before.config.moe, **coefficients) if before.config.moe.enabled else MoEConfig()
    assert after.config.moe == expected


def random_model(experts: int) -> Contents:
    """One MoE layer, made when it is read."""
    shape = ModelConfig(num_layers=1, hidden_size=512, num_attention_heads=8, seq_length=8)
    moe = MoEConfig(num_experts=(experts,), expert_interval=1)

    def lazy(size: tuple[int, ...]) -> Lazy:
        return Lazy(size, torch.float32, lambda row: torch.ones(size if row is None else size[1:]))

    tensors = {"model." + name: lazy(size) for name, size in parameter_shapes(shape, moe, 128).items()}
    config = to_dict(RunConfig(model=shape, moe=moe))
    return Contents("random", new_meta(config, 128, {"vocab_size": 128, "fingerprint": ""}, 8, {}), tensors)


def test_writing_holds_few_experts_in_memory(tmp_path):
    write_megatron_deepspeed(random_model(2), tmp_path / "warm-up")
    grown = extra(lambda: write_megatron_deepspeed(random_model(24), tmp_path / "theirs"))
    sizes = [path.stat().st_size for path in (tmp_path / "theirs").glob("*/layer_0_expert_*")]
    assert len(sizes) == 24
    assert grown < sum(sizes) / 2


def test_what_cannot_be_written_is_refused(written, tmp_path):
    saved = written[0]["top2"]
    for options, message in (
        ({"tp": 3}, "--tp 3: the padded vocabulary of 128"),
        ({"tp": 2, "pp": 2}, "--pp and --ep have no meaning for --to megatron-deepspeed"),
    ):
        with pytest.raises(ValueError, match=message):
            run(saved, saved.folder, tmp_path / "theirs", "megatron-deepspeed", **options)
    assert not list(tmp_path.iterdir())
    model = dataclasses.replace(saved_model.SHAPE, qk_layernorm=True)
    saved = saved_model.save_model(tmp_path, MODELS["dense"], model)
    with pytest.raises(CheckpointError, match="model with --qk-layernorm, which Megatron-DeepSpeed does not have"):
        run(saved, saved.folder, tmp_path / "theirs", "megatron-deepspeed")
    for method in ("quantile_balancing", "expert_bias"):
        saved = saved_model.save_model(
            tmp_path / method, dataclasses.replace(MODELS["top2"], **saved_model.BALANCING[method], moe_loss_coeff=None)
        )
        with pytest.raises(CheckpointError, match=rf"with a bias for each \({method}\), which .* use --to hf"):
            run(saved, saved.folder, tmp_path / "theirs", "megatron-deepspeed")
    moe = dataclasses.replace(MODELS["top2"], moe_router_center_input=True)
    saved = saved_model.save_model(tmp_path / "centered", moe)
    with pytest.raises(
        CheckpointError, match="model with --moe-router-center-input, which Megatron-DeepSpeed does not"
    ):
        run(saved, saved.folder, tmp_path / "theirs", "megatron-deepspeed")
    assert not (tmp_path / "theirs").exists()


def test_loads_of_the_global_batch_are_left_out_and_told(tmp_path):
    moe = MoEConfig(num_experts=(4,), **saved_model.BALANCING["global_aux_loss"])
    saved = saved_model.save_model(tmp_path, moe)
    told = run(saved, saved.folder, tmp_path / "theirs", "megatron-deepspeed", dtype="bf16")
    assert any("moe_router_load_balancing_type global_aux_loss" in line for line in told)
    run(saved, tmp_path / "theirs", tmp_path / "back")
    back = read_native(tmp_path / "back")
    assert (back.config.moe.balancing, back.config.moe.moe_loss_coeff) == ("aux_loss", 0.01)
    assert [name for name in back.tensors if is_learned(name)] == []


def test_what_is_missing_or_hostile_is_named(written, tmp_path):
    saved, tag = written[0]["residual"], written[1] / "v3" / "global_step7"
    names = sorted(path.name for path in tag.iterdir())
    copy = tmp_path / "copy"

    def fails(message: str, name: str, content: object = None) -> None:
        copy.mkdir()
        for each in names:
            if each != name:
                os.link(tag / each, copy / each)
            elif isinstance(content, bytes):
                (copy / each).write_bytes(content)
            elif content is not None:
                torch.save(content, copy / each)
        with pytest.raises(CheckpointError, match=message):
            run(saved, copy, tmp_path / "native")
        assert not (tmp_path / "native").exists()
        for each in copy.iterdir():
            each.unlink()
        copy.rmdir()

    expert = next(name for name in names if name.startswith("layer_0_expert_2_"))
    first = "mp_rank_00_model_states.pt"
    fails(r"deepspeed_experts\.2\.dense_h_to_4h\.weight is missing", expert)
    fails("lacks mp_rank_00_model_states.pt", first)
    fails(f"{expert} is damaged or holds something else", expert, b"x" * 100)
    fails(
        f"{first} is damaged or holds something else .*it names .*Popen, which is not allowed",
        first,
        {"module": subprocess.Popen},
    )
    content = torch.load(tag / first, weights_only=False)
    fails("saved without Megatron's arguments", first, {"module": content["module"]})
    content["args"].hidden_size = 16
    fails("mp_rank_01_model_states.pt says hidden_size 32, mp_rank_00_model_states.pt says 16", first, content)
    content["args"].hidden_size = 32
    content["args"].swiglu = True
    fails("holds a model that is not known here: swiglu True", first, content)
    copy.mkdir()
    (copy / "latest").write_bytes(b"\xff")
    (copy / "mp_rank_00_model_states.pt").touch()  # so that it looks like one of theirs
    with pytest.raises(CheckpointError, match="latest names '\N{REPLACEMENT CHARACTER}', which is no folder"):
        run(saved, copy, tmp_path / "native")
    with pytest.raises(CheckpointError, match="holds no tokenizer; give the model's by --tokenizer-type"):
        list(convert(Conversion(str(tag), str(tmp_path / "native"), "native")))


def test_what_a_pipeline_lacks_is_named(written, tmp_path):
    saved, folder = written[0]["dense"], written[1] / "tp2" / "global_step7"

    def fails(message: str, name: str, content: object = None) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            torch.save(content, copy / name)
        with pytest.raises(CheckpointError, match=message):
            run(saved, copy, tmp_path / "native")
        shutil.rmtree(copy)

    fails(
        r"encoder.layers.1.input_layernorm.weight has 1 of 2; .* copy the files of all ranks",
        "layer_03-model_01-model_states.pt",
    )
    fails(r"encoder.final_layernorm\..* has 1 of 2", "layer_04-model_00-model_states.pt")
    fails(
        "module 5 is an output layer that is not tied",
        "layer_05-model_00-model_states.pt",
        {"lm_head.weight": torch.ones(4)},
    )
    table = torch.load(folder / "layer_01-model_00-model_states.pt")["word_embeddings.weight"]
    other = {"word_embeddings.weight": torch.cat([table, table]) + 1}
    fails("word_embeddings.weight differs between stages", "layer_05-model_00-model_states.pt", other)
    shutil.copytree(folder, tmp_path / "copy")
    for rank in range(2):
        (tmp_path / "copy" / f"layer_03-model_{rank:02d}-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks module 3 of the pipeline, a layer; copy layer_03-"):
        run(saved, tmp_path / "copy", tmp_path / "native")


@pytest.fixture
def of_two_ranks(tmp_path):
    """A model, and the folder of what we wrote of it for two tensor-parallel ranks."""
    saved = saved_model.save_model(tmp_path)
    run(saved, saved.folder, tmp_path / "theirs", "megatron-deepspeed", tp=2)
    return saved, tmp_path / "theirs" / "global_step3"


def recast(path: Path, dtype: torch.dtype) -> None:
    """The tensors of a file in another number format."""
    content = torch.load(path, weights_only=False)

    def changed(value: object) -> object:
        if isinstance(value, dict):
            return {key: changed(inner) for key, inner in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    torch.save(changed(content), path)


def test_experts_in_another_number_format_than_the_rest(of_two_ranks, tmp_path):
    saved, tag = of_two_ranks
    for path in tag.iterdir():
        recast(path, torch.float16 if "expert" in path.name else torch.bfloat16)
    run(saved, tag, tmp_path / "native")
    assert inspect(str(tmp_path / "native"), verify=True)["verified"]
    back = read_native(tmp_path / "native")
    for name, parameter in saved.model.state_dict().items():
        tensor = back.tensors["model." + name].read(None)
        assert tensor.dtype == (torch.float16 if ".experts." in name else torch.bfloat16), name
        assert torch.equal(tensor, parameter.to(tensor.dtype)), name
    load_model(find_checkpoint(tmp_path / "native"))


def test_parts_of_a_tensor_in_several_number_formats_are_refused(of_two_ranks, tmp_path):
    saved, tag = of_two_ranks

    def fails(path: Path, dtype: torch.dtype, message: str) -> None:
        whole = path.read_bytes()
        recast(path, dtype)
        with pytest.raises(CheckpointError, match=message):
            run(saved, tag, tmp_path / "native")
        assert not (tmp_path / "native").exists()
        path.write_bytes(whole)

    for rank in range(2):  # the first rank's file of an expert is the one that is read
        path = tag / f"layer_0_expert_2_mp_rank_{rank:02d}_model_states.pt"
        fails(path, torch.float16, r"experts\.2\.dense_h_to_4h\.weight is float16, .* float32")
    fails(path, torch.int8, "is int8, expected floating-point numbers|first expert of the layer float32")
    path = tag / "mp_rank_01_model_states.pt"
    fails(path, torch.float64, "word_embeddings.weight is float64, the first rank's shard float32")


def test_files_that_are_missing_or_of_another_checkpoint_are_named(of_two_ranks, tmp_path):
    saved, tag = of_two_ranks
    expert = torch.load(tag / "layer_0_expert_3_mp_rank_00_model_states.pt")

    def fails(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            run(saved, tag, tmp_path / "native")
        assert not (tmp_path / "native").exists()

    for name, message in (
        ("layer_0_expert_4_mp_rank_00", "layer_0_expert_4_.* which is not of expert 4 or is in another file too"),
        ("layer_1_expert_3_mp_rank_00", "layer_1_expert_3_.* which is not of expert 3 or is in another file too"),
        ("layer_0_expert_3_mp_rank_02", "of mp_rank_02, where 2 ranks saved; remove files of another"),
    ):
        torch.save(expert, tag / f"{name}_model_states.pt")
        fails(message)
        (tag / f"{name}_model_states.pt").unlink()
    deep = {"x": torch.ones(1)}
    for _ in range(60):
        deep = {"x": deep}
    first = tag / "mp_rank_00_model_states.pt"
    content = torch.load(first, weights_only=False)
    torch.save(content | {"module": deep}, first)
    fails("nested more than 50 deep")
    torch.save(content | {"checkpoint_version": 9.0}, first)
    fails("has checkpoint_version 9, expected one of 0, 1, 2, 3")
    torch.save(content, first)
    second = tag / "mp_rank_01_model_states.pt"
    whole = second.read_bytes()
    other = torch.load(second, weights_only=False)
    other["args"].num_attention_heads = 2
    torch.save(other, second)
    fails("mp_rank_01_model_states.pt says num_attention_heads 2, mp_rank_00_model_states.pt says 4")
    second.write_bytes(first.read_bytes())
    fails("ranks 0 and 1 hold the same rows of the token table, so one file is a copy of the other")
    second.write_bytes(whole)
    run(saved, tag, tmp_path / "native")
    shutil.rmtree(tmp_path / "native")
    second.unlink()
    fails("holds files of 1 tensor-parallel ranks, and was saved by 2; copy the files of all ranks")
