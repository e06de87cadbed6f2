"""Checkpoints that megatron.core and transformers' converter wrote, and Megatron-LM's older names."""

import argparse
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import saved_model
import tiny_run
import torch
from conversion import core_cases
from conversion import deepspeed_model as ds

from megatron.checkpoint import CheckpointError
from megatron.config import MoEConfig
from megatron.conversion.convert import convert
from megatron.conversion.job import Conversion
from megatron.conversion.native import read_native
from megatron.model.gpt import GPTModel

JOB = Path(__file__).with_name("core_job.py")
CASES = core_cases.CASES[1] | core_cases.CASES[2]
ITERATION = "iter_0000007"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model of ours; its tokenizer is everyone's here."""
    return saved_model.save_model(tmp_path_factory.mktemp("dense"), MoEConfig())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What jobs of one and two processes saved, and the logits that they computed."""
    folder = tmp_path_factory.mktemp("core")
    torch.save(torch.randint(122, (2, 48)), folder / "tokens.pt")
    for processes in core_cases.CASES:
        starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*starter, str(JOB), str(folder)], env=tiny_run.environment(), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def run(dense, tmp_path):
    def convert_to_native(source: Path, **options: object):
        options = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(dense.tokenizer_file)} | options
        list(convert(Conversion(str(source), str(tmp_path / "native"), "native", **options)))
        return read_native(tmp_path / "native")

    yield convert_to_native
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def model_of(contents) -> GPTModel:
    model = GPTModel(contents.config.model, contents.config.moe, contents.meta["vocab_size"]).eval()
    model.load_state_dict({name: contents.tensors["model." + name].read(None) for name, _ in model.named_parameters()})
    return model


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_model_computes_what_megatron_core_computed(written, run, name, kind):
    case = CASES[name]
    contents = run(written / name / kind, gelu_as_tanh=not case.biases)
    logits = model_of(contents)(torch.load(written / "tokens.pt"))
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits, torch.load(written / name / "logits.pt"), rtol=0, atol=1e-5)
    moe = contents.config.moe
    assert [moe.experts_of_layer(layer) for layer in range(2)] == [1 + 3 * has for has in case.experts or (0, 0)]
    if case.experts:
        assert (moe.topk, moe.moe_loss_coeff, moe.moe_z_loss_coeff) == (case.topk, 0.02, 1e-3)
        assert not moe.moe_token_dropping
    assert contents.config.model.qk_layernorm == case.qk_layernorm
    assert contents.meta["origin"]["format"] == "megatron-lm"


def test_transformer_engines_names_are_read(written, run, tmp_path):
    """Its layer norms are parts of the matrices that read them, and its experts' matrices are numbered."""
    file = f"{ITERATION}/mp_rank_00/model_optim_rng.pt"
    shutil.copytree(written / "single" / "torch", tmp_path / "engine")
    content = torch.load(tmp_path / "engine" / file, weights_only=False)
    renamed = {}
    for name, tensor in content["model"].items():
        name = re.sub(r"input_layernorm\.", "self_attention.linear_qkv.layer_norm_", name)
        name = re.sub(r"(layers\.1\.)pre_mlp_layernorm\.", r"\1mlp.linear_fc1.layer_norm_", name)  # a dense layer
        name = re.sub(r"local_experts\.(\d)\.(.*)\.weight", r"\2.weight\1", name)
        renamed[name] = tensor
    assert "decoder.layers.0.mlp.experts.linear_fc2.weight3" in renamed
    torch.save(content | {"model": renamed}, tmp_path / "engine" / file)
    tensors = {name: lazy.read(None) for name, lazy in run(tmp_path / "engine", gelu_as_tanh=True).tensors.items()}
    shutil.rmtree(tmp_path / "native")
    expected = run(written / "single" / "torch_dist", gelu_as_tanh=True)
    assert list(tensors) == list(expected.tensors)
    for name, lazy in expected.tensors.items():
        assert torch.equal(tensors[name], lazy.read(None)), name


def test_what_is_missing_or_hostile_is_named(written, run, tmp_path):
    def fails(message: str, kind: str, damage, *, name: str = "ep2", **options: object) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(written / name / kind, copy)
        damage(copy / ITERATION)
        with pytest.raises(CheckpointError, match=message):
            run(copy, **options)
        assert not (tmp_path / "native").exists()
        shutil.rmtree(copy)

    def common(file: str, **changes: object):
        def change(folder: Path) -> None:
            content = torch.load(folder / file, weights_only=False)
            for key, value in changes.items():
                setattr(content["args"], key, value)
            torch.save(content, folder / file)

        return change

    first, shared = "mp_rank_00_000/model_optim_rng.pt", "common.pt"
    for kind, file in (("torch", first), ("torch_dist", shared)):
        for change, message in (
            ({"swiglu": True}, "swiglu True"),
            ({"position_embedding_type": "rope"}, "position_embedding_type 'rope'"),
            ({"normalization": "RMSNorm"}, "normalization 'RMSNorm'"),
            ({"bias_gelu_fusion": False}, "exact GELU .* --gelu-as-tanh"),
            ({"moe_router_pre_softmax": False}, "moe_router_pre_softmax False with moe_router_topk 1"),
            ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn'"),
            ({"moe_ffn_hidden_size": 64}, "moe_ffn_hidden_size 64, unlike that of dense layers"),
        ):
            fails(f"model that is not known here: .*{message}", kind, common(file, **change))
        fails("damaged or holds something else .*it names .*Popen", kind, common(file, hook=subprocess.Popen))
    fails("lacks mp_rank_00_001/model_optim_rng.pt", "torch", lambda folder: shutil.rmtree(folder / "mp_rank_00_001"))
    fails("experts shared by 2 tensor-parallel ranks", "torch", common(first, expert_tensor_parallel_size=2))
    fails("says '7', and there is no iter_0000007", "torch", shutil.rmtree)

    def bias(folder: Path) -> None:
        content = torch.load(folder / first, weights_only=False)
        content["model"]["decoder.layers.1.mlp.router.bias"][2] = 1
        torch.save(content, folder / first)

    fails(r"layers.1.mlp.*bias differs between experts; routers here have no bias", "torch", bias)

    def untied(folder: Path) -> None:
        path = folder / "mp_rank_00_001/model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        content["model"]["output_layer.weight"][2] = 1
        torch.save(content, path)

    fails("the output layer is not tied", "torch", untied, name="dense_pp2")
    fails("lacks __1_0.distcp", "torch_dist", lambda folder: (folder / "__1_0.distcp").unlink())
    fails("no common.pt", "torch_dist", lambda folder: (folder / "common.pt").unlink())
    zarr = json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1})
    fails("says 'zarr' of version 1", "torch_dist", lambda folder: (folder / "metadata.json").write_text(zarr))
    for hostile in (pickle.dumps(subprocess.Popen), b"x" * 100):
        fails(
            r"\.metadata is damaged or holds something else",
            "torch_dist",
            lambda folder, hostile=hostile: (folder / ".metadata").write_bytes(hostile),
        )


def test_files_of_a_distributed_checkpoint_are_neither_unpickled_nor_sought_elsewhere(written, run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written / "dense" / "torch_dist" / ITERATION, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, place = next(item for item in metadata.storage_data.items() if item[0].fqn.endswith("embeddings.weight"))
    torch.save({"run": subprocess.Popen}, folder / "hostile.distcp")
    torch.save(torch.ones(1, 1), folder / "small.distcp")
    torch.save(torch.ones(metadata.state_dict_metadata[index.fqn].size).half(), folder / "half.distcp")
    for path, message in (
        ("small.distcp", r"embeddings.weight has a chunk of float32 \[1, 1\], where .metadata says float32 \["),
        ("half.distcp", r"embeddings.weight has a chunk of float16 \[.*, where .metadata says float32 \["),
        ("hostile.distcp", "hostile.distcp is damaged .*it names .*Popen, which is not allowed"),
        ("../hostile.distcp", "names files of other folders: ../hostile.distcp"),
    ):
        size = (folder / path).stat().st_size if (folder / path).exists() else 0
        metadata.storage_data[index] = type(place)(relative_path=path, offset=0, length=size)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=message):
            run(folder)
    del metadata.storage_data[index]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"does not tell where .*embeddings.weight is"):
        run(folder)


# --------------------------------------------------------------------------------------------- older names


def save_old(folder: Path, ours: dict[str, torch.Tensor], version: float, stages: int, chunks: int) -> None:
    """A dense model in the nesting and the files of Megatron-LM before megatron.core, for two tensor-parallel ranks."""
    args = argparse.Namespace(
        num_layers=ds.LAYERS, hidden_size=ds.H, num_attention_heads=ds.N, seq_length=ds.POSITIONS,
        max_position_embeddings=ds.POSITIONS, params_dtype=torch.float32,
        **{("model" if version == 0 else "tensor_model") + "_parallel_size": ds.TP},
        pipeline_model_parallel_size=stages,
    )  # fmt: skip
    for rank, stage in itertools.product(range(ds.TP), range(stages)):
        whole = ds.Gpt(None)
        ds.fill(whole.language_model.named_parameters(), ours, version, rank, 0)
        state = whole.state_dict()["language_model"]
        content = {"args": args} | ({"checkpoint_version": version} if version else {})
        per_chunk = ds.LAYERS // stages // chunks
        for chunk in range(chunks):
            first = (chunk * stages + stage) * per_chunk
            mine = {f"layers.{first + layer}.": f"layers.{layer}." for layer in range(per_chunk)}
            encoder = {
                local + name.removeprefix(layer): tensor
                for layer, local in mine.items()
                for name, tensor in state["encoder"].items()
                if name.startswith(layer)
            }
            if version < 2:
                encoder = {name.replace("self_attention", "attention"): tensor for name, tensor in encoder.items()}
            elif chunks > 1:  # since autumn 2023
                encoder = {name.replace("_layernorm", "_norm"): tensor for name, tensor in encoder.items()}
            model = {"language_model": {"transformer" if version < 2 else "encoder": encoder}}
            if first == 0:
                model["language_model"]["embedding"] = state["embedding"]
            if first + per_chunk == ds.LAYERS:
                encoder |= {name: tensor for name, tensor in state["encoder"].items() if name.startswith("final")}
                if stages > 1:
                    model["word_embeddings_for_head"] = state["embedding"]["word_embeddings"]
            content["model" if chunks == 1 else f"model{chunk}"] = model
        own = folder / "release" / (f"mp_rank_{rank:02d}" + f"_{stage:03d}" * (stages > 1))
        own.mkdir(parents=True)
        torch.save(content, own / "model_optim_rng.pt", _use_new_zipfile_serialization=version > 0)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")


@pytest.mark.parametrize(
    ("version", "stages", "chunks"), [(0, 1, 1), (1.0, 1, 1), (2.0, 2, 1), (3.0, 1, 2), (3.0, 1, 1)]
)
def test_older_names_are_read(dense, run, tmp_path, version, stages, chunks):
    ours = dense.model.state_dict()
    save_old(tmp_path / "old", ours, version, stages, chunks)
    back = run(tmp_path / "old")
    for name, tensor in ours.items():
        assert torch.equal(back.tensors["model." + name].read(None), tensor), name


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 2)])
def test_what_transformers_converts_to_megatron_lm_is_read(dense, run, tmp_path, monkeypatch, tensor, stages):
    converter = pytest.importorskip(
        "transformers.models.megatron_gpt2.checkpoint_reshaping_and_interoperability", reason="of transformers 4 only"
    )
    hf = tmp_path / "hf"
    list(convert(Conversion(str(dense.folder), str(hf), "hf")))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf)
    torch.save(model.state_dict(), hf / "pytorch_model.bin")
    padding = sys.modules.setdefault("megatron.training.tokenizer.tokenizer", argparse.Namespace())
    monkeypatch.setattr(padding, "_vocab_size_with_padding", lambda size, _: size, raising=False)
    converter.convert_checkpoint_from_transformers_to_megatron(
        argparse.Namespace(
            load_path=str(hf),
            save_path=str(tmp_path / "theirs"),
            megatron_path=None,
            target_tensor_model_parallel_size=tensor,
            target_pipeline_model_parallel_size=stages,
            target_data_parallel_size=1,
            target_params_dtype="fp32",
            make_vocab_size_divisible_by=128,
            use_distributed_optimizer=stages > 1,
            print_checkpoint_structure=False,
        )
    )
    back = run(tmp_path / "theirs")
    for name, parameter in dense.model.state_dict().items():
        assert torch.equal(back.tensors["model." + name].read(None), parameter), name


def test_what_does_not_belong_together_is_refused(dense, run, tmp_path):
    ours = dense.model.state_dict()
    save_old(tmp_path / "old", ours, 3.0, 1, 1)
    first, second = (tmp_path / "old" / "release" / f"mp_rank_{rank:02d}" for rank in range(2))
    shutil.copytree(second, first.with_name("mp_rank_02"))
    with pytest.raises(CheckpointError, match=r"mp_rank_02/model_optim_rng\.pt is of none of the 2 tensor-"):
        run(tmp_path / "old")
    shutil.rmtree(first.with_name("mp_rank_02"))
    content = torch.load(second / "model_optim_rng.pt", weights_only=False)
    encoder = content["model"]["language_model"]["encoder"]
    encoder["layers.0.mlp.dense_h_to_4h.weight"] = encoder["layers.0.mlp.dense_h_to_4h.weight"].half()
    torch.save(content, second / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"dense_h_to_4h\.weight is float16, the first rank's shard float32"):
        run(tmp_path / "old")
