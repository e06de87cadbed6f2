"""Checkpoints that DeepSpeed's own engine and MoE layer wrote, with tensor and expert parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import saved_model
import tiny_run
import torch

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats.convert import Conversion, convert
from megatron.checkpoint.formats.native import read_native
from megatron.config import MoEConfig

JOB = Path(__file__).with_name("deepspeed_job.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Our model, and the folder with what a job of two processes saved of it in each layout of Q, K and V."""
    folder = tmp_path_factory.mktemp("deepspeed")
    saved = saved_model.save_model(folder, MoEConfig(num_experts=(4,), mlp_type="residual"))
    torch.save(dict(saved.model.state_dict()), folder / "weights.pt")
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*starter, str(JOB), str(folder / "weights.pt"), str(folder)],
        env=tiny_run.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return saved, folder


def run(written, source: Path, save: Path) -> None:
    options = {"tokenizer_type": "HFTokenizer", "tokenizer_model": str(written[0].tokenizer_file)}
    list(convert(Conversion(str(source), str(save), "native", **options)))


@pytest.mark.parametrize("version", ["0", "1", "3"])
def test_weights_are_ours_again(written, tmp_path, version):
    saved, folder = written
    run(written, folder / f"v{version}", tmp_path / "native")
    back = read_native(tmp_path / "native")
    expected = saved.model.state_dict()
    assert len(back.tensors) == len(list(saved.model.parameters()))
    for name, parameter in expected.items():
        assert torch.equal(back.tensors["model." + name].read(None), parameter), name
    config = back.config
    assert (config.model.num_attention_heads, config.moe.num_experts, config.moe.mlp_type) == (4, (4,), "residual")


def test_what_is_missing_or_hostile_is_named(written, tmp_path):
    tag = written[1] / "v3" / "global_step7"
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
            run(written, copy, tmp_path / "native")
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
    fails(r"word_embeddings.weight has a piece of \[64, 32\], expected \[64, 16\]", first, content)
    with pytest.raises(CheckpointError, match="holds no tokenizer; give the model's by --tokenizer-type"):
        list(convert(Conversion(str(tag), str(tmp_path / "native"), "native")))
