"""Exported models with the oldest and the newest transformers that the extra allows, with Trainer, TRL and peft.

Each release has a virtual environment ``.venv-transformers-...`` in the checkout, which a first run makes (pip needs a
package index) and later ones bring up to date. Torch and all else comes from the environment of the tests. In it
hf_release_job.py runs, which this package is not in.
"""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import saved_model
import torch
from conversion import hf_release_job as job

from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.convert import convert
from megatron.conversion.job import Conversion
from megatron.inference.generate import generate
from megatron.inference.load import find_checkpoint, load_model
from megatron.inference.sampling import Sampling
from megatron.moe.balancing import learned_buffers

ROOT = Path(__file__).parents[2]
RELEASES = {  # what pip is asked for; versions of other packages that are too new for transformers 4 are held back
    "oldest": ["transformers==4.57.*", "datasets<5", "trl", "peft"],
    "newest": ["transformers", "trl", "peft", "onnx", "onnxscript", "onnxruntime"],
}
SHAPE = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=48, init_method_std=0.2)
MODELS = {
    "top1": MoEConfig(num_experts=(4,)),
    "top2": MoEConfig(num_experts=(4,), topk=2, mlp_type="residual", moe_z_loss_coeff=0.01),
    "biased": MoEConfig(num_experts=(4,), topk=2, mlp_type="residual", **saved_model.BALANCING["quantile_balancing"]),
    "dense": MoEConfig(),
}
CLOSE = 2e-5

pytestmark = [pytest.mark.transformers_releases, pytest.mark.slow]


@dataclasses.dataclass(frozen=True)
class Release:
    """An environment with a release of transformers."""

    name: str
    python: Path
    modules: Path  # where transformers keeps the code of exports

    def __call__(self, check: str, *folders: Path) -> dict[str, Any]:
        """What the job prints."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": str(self.modules), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [self.python, Path(__file__).with_name("hf_release_job.py"), check, *folders],
            cwd=self.modules, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory) -> Release:
    folder = ROOT / f".venv-transformers-{request.param}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (Path(packages) / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *RELEASES[request.param]], check=True)
    return Release(request.param, python, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[saved_model.SavedModel, Path]]:
    """Saved models and their exports."""
    models = {}
    for name, moe in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        saved = saved_model.save_model(folder, moe, SHAPE)
        list(convert(Conversion(str(saved.folder), str(folder / "hf"), "hf", max_shard_size="100KB")))
        models[name] = saved, folder / "hf"
    return models


@pytest.mark.parametrize("name", ["top1", "top2", "biased"])
def test_generation_is_ours(release, exported, name):
    saved, folder = exported[name]
    out = release("generation", folder)
    assert release.name != "oldest" or out["version"].startswith("4.57.")
    model = load_model(find_checkpoint(saved.folder))
    expected = generate(model, job.PROMPTS, job.NEW, Sampling(0.0, 0, 1.0), eod=job.END, vocab_size=job.END)
    assert {way: tokens for way, tokens in out["greedy"].items() if tokens != expected} == {}
    assert release.name == "oldest" or "experts grouped_mm" in out["greedy"]
    assert out["beams"]["beams"] == out["beams"]["beams, no cache"]


def test_what_routers_learned_is_neither_rounded_nor_lost(release, exported):
    saved, folder = exported["biased"]
    found = release("biases", folder)
    on_disk = {found.pop("on a disk, float32"), found.pop("on a disk, bfloat16")}
    assert on_disk == ({"input_mean was not loaded"} if release.name == "oldest" else {"as in memory"})
    learned = learned_buffers(saved.model).items()
    expected = {
        kind: [buffer.tolist() for name, buffer in learned if name.endswith(f".{kind}")]
        for kind in ("expert_bias", "input_mean")
    }
    assert all(expected.values())
    assert len(found) == 5
    for way, buffers in found.items():
        assert buffers == expected, way


@pytest.mark.parametrize("name", ["top2", "biased"])
def test_trainer_trains_evaluates_and_saves(release, exported, name):
    out = release("training", exported[name][1])
    assert out["before"] == pytest.approx(out["by hand"], rel=1e-5)
    assert out["after"] < out["before"]
    assert out["same"]
    assert out["saved"] == ["attention_gpt_moe.py", "configuration_gpt_moe.py", "modeling_gpt_moe.py"]


def test_packed_documents_are_apart_as_in_gpt2(release, exported):
    out = release("packing", exported["top2"][1], exported["dense"][1])
    assert len(out) == 8
    for way, difference in out.items():
        assert (difference > 1) if way.endswith("apart") else (difference < CLOSE), (way, difference)


def test_trl_and_peft(release, exported):
    out = release("tuning", exported["top2"][1])
    assert out["packed"]["documents"] > 1
    assert "position_ids" in out["packed"]["keys"]
    assert out["packed"]["difference"] < CLOSE
    assert all(torch.tensor(out[way]["losses"] + [out[way]["eval"]]).isfinite().all() for way in ("packed", "padded"))
    assert out["lora"]["changed"] > 0.1
    assert max(out["lora"]["loaded"], out["lora"]["merged"]) < CLOSE


def test_traced_models_take_other_experts_for_other_tokens(release, exported):
    """What is traced computes what the model computes, on other inputs; what cannot be traced is an error."""
    out = release("tracing", exported["top2"][1])
    wrong = {way: found for way, found in out.items() if not isinstance(found, str) and not found < CLOSE}
    assert wrong == {}
    works = ["eager jit.trace other", "eager export other", "eager export, any length longer"]
    if release.name == "newest":
        works += ["grouped_mm jit.trace longer", "grouped_mm export, any length longer", "eager onnx longer"]
        works += ["batched_mm jit.trace longer", "batched_mm export, any length longer", "batched_mm onnx longer"]
    assert {way: out.get(way) for way in works if not isinstance(out.get(way), float)} == {}
