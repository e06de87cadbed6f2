"""Exports to Hugging Face's libraries, and the way back."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import saved_model
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.folder import hash_file
from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.convert import convert
from megatron.conversion.hf_config import is_gpt2
from megatron.conversion.inspect import inspect
from megatron.conversion.job import Conversion
from megatron.conversion.native import read_native
from megatron.inference.generate import generate
from megatron.inference.load import find_checkpoint, load_model
from megatron.inference.sampling import Sampling
from megatron.moe.balancing import learned_buffers

DEEP = ModelConfig(num_layers=6, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, seq_length=48)
MODELS = {
    "dense": (saved_model.SHAPE, MoEConfig()),
    "top1": (saved_model.SHAPE, saved_model.EXPERTS),
    "top2_residual": (saved_model.SHAPE, MoEConfig(num_experts=(4,), topk=2, mlp_type="residual", expert_interval=1)),
    "qk_layernorm": (dataclasses.replace(saved_model.SHAPE, qk_layernorm=True), saved_model.EXPERTS),
    "dense_qk_layernorm": (dataclasses.replace(saved_model.SHAPE, qk_layernorm=True), MoEConfig()),
    "biased": (
        saved_model.SHAPE,
        MoEConfig(num_experts=(8,), topk=2, expert_interval=1, **saved_model.BALANCING["quantile_balancing"]),
    ),
    "pyramid_top3": (DEEP, MoEConfig(num_experts=(4, 8), topk=3, expert_interval=3)),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A saved model and its export, in small shards."""
    folder = tmp_path_factory.mktemp(request.param)
    shape, moe = MODELS[request.param]
    saved = saved_model.save_model(folder, moe, dataclasses.replace(shape, init_method_std=0.2))
    told = list(run(saved.folder, folder / "hf", "hf", max_shard_size="40KB"))
    assert told[-1] == f"wrote {folder / 'hf'}"
    return saved, folder / "hf"


def run(load: Path, save: Path, target: str, **options: str):
    return convert(Conversion(str(load), str(save), target, **options))


def same_tensors(one: Path, other: Path) -> None:
    a, b = read_native(one), read_native(other)
    assert list(a.tensors) == list(b.tensors)
    for name, lazy in a.tensors.items():
        assert torch.equal(lazy.read(None), b.tensors[name].read(None)), name


@torch.no_grad()
def test_logits_are_ours(exported):
    saved, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert (type(model) is GPT2LMHeadModel) == is_gpt2(saved.config.model, saved.config.moe)
    ours = load_model(find_checkpoint(saved.folder))
    tokens = torch.randint(122, (3, 48))
    expected = ours(tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    padded = torch.cat([torch.zeros(3, 7, dtype=torch.int64), tokens[:, :20]], dim=1)  # at the front, as generate does
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, 7:], expected[:, :20], rtol=0, atol=1e-5)


def test_round_trip_is_exact(exported, tmp_path):
    saved, folder = exported
    list(run(folder, tmp_path / "back", "native"))
    same_tensors(saved.folder, tmp_path / "back")
    before, after = read_native(saved.folder), read_native(tmp_path / "back")
    assert after.step == before.step
    tokenizer = after.meta["config"]["data"].pop("tokenizer_model")
    assert Path(tokenizer).is_relative_to(tmp_path / "back")
    before.meta["config"]["data"].pop("tokenizer_model")
    assert after.meta == before.meta
    list(run(tmp_path / "back", tmp_path / "again", "hf", max_shard_size="40KB"))
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir() if path.suffix != ".json"}


def unstack(folder: Path) -> None:
    """Make an export what it was in earlier versions: a module for each expert, matrices output-first."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        prefix, kind = name.rsplit(".", 1)
        theirs = ("c_fc" if kind.startswith("up") else "c_proj") + (".bias" if kind.endswith("bias") else ".weight")
        for number, part in enumerate(tensors.pop(name)):
            tensors[f"{prefix}.{number}.{theirs}"] = (part.T if part.dim() == 2 else part).contiguous()
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    about.pop("num_experts")
    (folder / "config.json").write_text(json.dumps(about))
    sidecar = json.loads((folder / "megatron_moe.json").read_text())
    sidecar["files"] = {
        path.name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in folder.iterdir()
        if path.name != "megatron_moe.json"
    }
    (folder / "megatron_moe.json").write_text(json.dumps(sidecar))


@pytest.mark.parametrize("exported", ["top2_residual", "pyramid_top3"], indirect=True)
@pytest.mark.parametrize("own_file", [True, False])
def test_exports_of_earlier_versions_come_back(exported, tmp_path, own_file):
    saved, folder = exported
    shutil.copytree(folder, tmp_path / "hf")
    unstack(tmp_path / "hf")
    if not own_file:
        (tmp_path / "hf" / "megatron_moe.json").unlink()
    list(run(tmp_path / "hf", tmp_path / "back", "native"))
    same_tensors(saved.folder, tmp_path / "back")


def test_without_our_own_file_too(exported, tmp_path):
    """As a folder that save_pretrained wrote comes back."""
    saved, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    model.save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "hf")
    list(run(tmp_path / "hf", tmp_path / "back", "native"))
    same_tensors(saved.folder, tmp_path / "back")
    back = read_native(tmp_path / "back").config
    assert dataclasses.replace(back.model, make_vocab_size_divisible_by=128) == dataclasses.replace(
        saved.config.model, ffn_hidden_size=saved.config.model.ffn_size
    )
    kept = ("num_experts", "expert_interval", "topk", "mlp_type", "aux_loss_coeff", "moe_z_loss_coeff", "balancing")
    if saved.config.moe.enabled:
        assert {name: getattr(back.moe, name) for name in kept} == {
            name: getattr(saved.config.moe, name) for name in kept
        }
    assert find_checkpoint(tmp_path / "back").meta["origin"]["format"] == "hf"


@pytest.mark.parametrize("method", saved_model.BALANCING)
def test_what_balancers_learned_in_training_alone_starts_anew(tmp_path, method):
    """Biases of experts are what exports hold, in fp32; steps of biases and loads of experts are not."""
    moe = dataclasses.replace(saved_model.EXPERTS, **saved_model.BALANCING[method])
    saved = saved_model.save_model(tmp_path, moe)
    list(run(saved.folder, tmp_path / "hf", "hf", dtype="bf16"))
    theirs = load_file(tmp_path / "hf" / "model.safetensors")
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    kinds = {tensor.dtype for name, tensor in theirs.items() if not name.endswith((".expert_bias", ".input_mean"))}
    assert (kinds, about["torch_dtype"]) == ({torch.bfloat16}, "bfloat16")
    assert about["router_center_input"] == any(name.endswith(".input_mean") for name in theirs)
    assert about["router_expert_bias"] == any(name.endswith(".expert_bias") for name in theirs) == moe.has_expert_bias
    list(run(tmp_path / "hf", tmp_path / "back", "native"))
    back = read_native(tmp_path / "back")
    assert back.config.moe == moe
    before = {"model." + name: buffer for name, buffer in learned_buffers(saved.model).items()}
    initial = {"expert_share": torch.full((4,), 0.25), "bias_step": torch.zeros(4)}
    for name, buffer in before.items():
        expected = initial.get(name.rsplit(".", 1)[1], buffer)
        torch.testing.assert_close(back.tensors[name].read(None), expected, rtol=0, atol=0)
    if not moe.has_expert_bias:
        return
    (tmp_path / "hf" / "megatron_moe.json").unlink()
    list(run(tmp_path / "hf", tmp_path / "without", "native"))
    assert read_native(tmp_path / "without").config.moe.balancing == "quantile_balancing"
    bias = "transformer.h.1.mlp.balancer.expert_bias"
    for config, tensors, message in (
        (about | {"router_center_input": not moe.moe_router_center_input}, theirs, r"mlp\.centering\.input_mean is "),
        (about | {"router_expert_bias": False}, theirs, f"{bias} is no tensor of this model"),
        (about, {name: tensor for name, tensor in theirs.items() if name != bias}, f"{bias} is missing"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "hf" / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            list(run(tmp_path / "hf", tmp_path / "no", "native"))


PLAIN = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
batch = tokenizer(prompts, return_tensors="pt", padding=True)
out = {}
for cache in ("dynamic", "static", None):
    kind = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False, disable_compile=True, **kind)
    out[str(cache)] = tokenizer.batch_decode(ids, skip_special_tokens=True)
model.gradient_checkpointing_enable()
model.train()
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    if isinstance(getattr(module, "dropout", None), float):
        module.dropout = 0.0
loss = model(batch.input_ids, labels=batch.input_ids, use_cache=False).loss
loss.backward()
out["checkpointed"] = float(model.transformer.wte.weight.grad.norm())
model.gradient_checkpointing_disable()
model.zero_grad()
model(batch.input_ids, labels=batch.input_ids, use_cache=False).loss.backward()
out["plain"] = float(model.transformer.wte.weight.grad.norm())
print(json.dumps(out))
print(json.dumps(sorted(name for name in sys.modules if name.startswith("megatron"))))
"""


@pytest.mark.parametrize(
    "exported", [pytest.param("dense", marks=pytest.mark.exhaustive), "top2_residual"], indirect=True
)
def test_plain_transformers_generates_our_text(exported, tmp_path):
    """In a process that cannot see this package: the same text with and without caches, batched, recomputed."""
    saved, folder = exported
    prompts = ["w1 w2 w3", "w7 w90 w4 w4 w11 w23"]
    environment = tiny_run.environment()
    environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, str(folder), *prompts],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, ours = map(json.loads, done.stdout.splitlines()[-2:])
    assert ours == []
    model = load_model(find_checkpoint(saved.folder))
    ids = [[int(word[1:]) for word in prompt.split()] for prompt in prompts]
    expected = [
        prompt + "".join(f" w{token}" for token in tokens if token < 120)
        for prompt, tokens in zip(
            prompts, generate(model, ids, 12, Sampling(0.0, 0, 1.0), eod=121, vocab_size=122), strict=True
        )
    ]
    assert out["dynamic"] == out["static"] == out["None"] == expected
    assert out["checkpointed"] == pytest.approx(out["plain"], rel=1e-5)


def random_gpt2(folder: Path, **changes: object) -> GPT2LMHeadModel:
    """A GPT-2 with an odd vocabulary, saved by transformers, and our test tokenizer beside it."""
    torch.manual_seed(3)
    values = {"vocab_size": 125, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48} | changes
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=121, eos_token_id=121, **values))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    tiny_run.make_tokenizer(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["safetensors", "shards", "torch", "old_torch", "bare_names"])
@torch.no_grad()
def test_gpt2_comes_in_and_goes_out_again(tmp_path, kind):
    model = random_gpt2(tmp_path / "hf")
    if kind == "shards":
        model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
        (tmp_path / "hf" / "model.safetensors").unlink()
    tensors = model.state_dict()
    if kind == "bare_names":  # as the hub's gpt2 has them, with constants of old versions
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        save_file(tensors, tmp_path / "hf" / "model.safetensors")
    if kind in ("torch", "old_torch"):  # the second as torch before 1.6
        (tmp_path / "hf" / "model.safetensors").unlink()
        file = tmp_path / "hf" / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "torch")
    list(run(tmp_path / "hf", tmp_path / "native", "native"))
    ours = load_model(find_checkpoint(tmp_path / "native"))
    tokens = torch.randint(125, (2, 64))
    torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=0, atol=1e-5)
    list(run(tmp_path / "native", tmp_path / "out", "hf"))
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"vocab_size": 60}, "tokenizer has 122 ids, the model's token table 60 rows"),
    ],
)
def test_other_gpts_are_refused_by_name(tmp_path, changes, message):
    random_gpt2(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError, match=message):
        list(run(tmp_path / "hf", tmp_path / "native", "native"))
    assert not (tmp_path / "native").exists()


def test_every_tensor_is_accounted_for(tmp_path):
    model = random_gpt2(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    good = load_file(file)

    def fails(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=message):
            list(run(tmp_path / "hf", tmp_path / "native", "native"))
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    fails(good | {"transformer.h.0.extra": torch.ones(1)}, "transformer.h.0.extra is no tensor of this model")
    fails({k: t for k, t in good.items() if "h.1.ln_2.bias" not in k}, r"transformer\.h\.1\.ln_2\.bias is missing")
    fails(good | {"transformer.ln_f.bias": torch.ones(5)}, r"transformer\.ln_f\.bias is \[5\], expected \[32\]")
    fails(good | {"lm_head.weight": model.lm_head.weight.detach() + 1}, "lm_head.weight differs from transformer.wte")
    fails(good | {"wte.weight": good["transformer.wte.weight"] + 1}, "has tensors under two names")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"n_layer": 10**9}, "are of 2 layers, and its configuration describes 1000000000"),
        (
            {"vocab_size": 10**18},
            r"wte.weight is \[\d+, 32\], and its configuration describes \[10{18}, 32",
        ),
    ],
    ids=str,
)
def test_wrong_sizes_are_told_before_a_model_of_them_is_made(size, message, tmp_path):
    """A billion layers would take all memory and hours."""
    random_gpt2(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | size))
    with pytest.raises(CheckpointError, match=message):
        list(run(tmp_path / "hf", tmp_path / "native", "native"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_model_files_of_another_model_are_refused(tmp_path):
    model = random_gpt2(tmp_path / "hf")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in (tmp_path / "shards").glob("model*"):
        path.rename(tmp_path / "hf" / path.name)

    def fails(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            list(run(tmp_path / "hf", tmp_path / "native", "native"))
        assert not (tmp_path / "native").exists()

    fails(r"holds both model\.safetensors and model\.safetensors\.index\.json; remove what is not of this model")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = index.read_text()
    index.unlink()
    fails(r"holds shards that are none of its model's: model-00001-of-0000\d\.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    index.write_text(content)
    save_file({"more": torch.ones(1)}, tmp_path / "hf" / "model-00009-of-00009.safetensors")
    fails(r"holds shards that are none of its model's: model-00009-of-00009\.safetensors; remove them")
    (tmp_path / "hf" / "model-00009-of-00009.safetensors").unlink()
    list(run(tmp_path / "hf", tmp_path / "native", "native"))


class Code:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple:
        return print, ("run",)


@pytest.mark.parametrize("archive", [True, False])
def test_pickled_code_is_named_and_not_run(tmp_path, capsys, archive):
    model = random_gpt2(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    content, file = model.state_dict() | {"more": Code()}, tmp_path / "hf" / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin .* names \S*print, which is not allowed"):
        list(run(tmp_path / "hf", tmp_path / "native", "native"))
    assert capsys.readouterr().out == ""


def test_damage_is_found_before_anything_is_written(tmp_path):
    saved = saved_model.save_model(tmp_path)
    export = tmp_path / "hf"
    list(run(saved.folder, export, "hf", max_shard_size="20KB"))
    shard = next(export.glob("model-00002-of-*"))
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(export.glob("*.safetensors")))

    def fails(message: str, load: Path = export) -> None:
        with pytest.raises((CheckpointError, ValueError), match=message):
            list(run(load, tmp_path / "new" / "back", "native"))
        assert not (tmp_path / "new").exists()

    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fails(f"{shard.name} has another SHA-256")
    shard.write_bytes(whole[:100])
    fails(f"{shard.name} has 100 bytes instead of {len(whole)}")
    (export / "megatron_moe.json").unlink()
    fails(f"{shard.name} is damaged")
    shard.unlink()
    fails(r"lacks 1 of its \d+ shards, with \d+ tensors: model-00002")
    (export / "config.json").write_text("{")
    fails("config.json cannot be read")
    data = next(saved.folder.glob("step_*/data-*.safetensors"))
    data.write_bytes(data.read_bytes()[:-4])
    fails("is damaged: data-00000.safetensors has", saved.folder)


def test_edited_files_of_an_export_are_named(tmp_path):
    saved = saved_model.save_model(tmp_path)
    export = tmp_path / "hf"
    list(run(saved.folder, export, "hf"))
    assert inspect(str(export), verify=False)["verified"]
    config, model, sidecar = (export / name for name in ("config.json", "model.safetensors", "megatron_moe.json"))

    def fails(message: str, **options: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            list(run(export, tmp_path / "back", "native", **options))
        assert not (tmp_path / "back").exists()

    other = tmp_path / "other.json"
    other.write_text(saved.tokenizer_file.read_text().replace('"w3"', '"v3"'))
    fails("given are not those that .* was trained with", tokenizer_model=str(other))
    shutil.copyfile(sidecar, tmp_path / "sidecar.json")
    content = json.loads(sidecar.read_text())
    for part in ("files", "config", "vocab_size"):
        wrong = {key: value for key, value in content.items() if key != part}
        wrong["meta"] = {key: value for key, value in content["meta"].items() if key != part}
        sidecar.write_text(json.dumps(wrong))
        fails(f"megatron_moe.json is damaged: KeyError: '{part}'")
    sidecar.unlink()
    assert not inspect(str(export), verify=True)["verified"]
    good = json.loads(config.read_text())
    for change, message in (
        ({"num_attention_heads": 0}, "--num-attention-heads 0 must be at least 1"),
        ({"num_experts_per_tok": "1"}, "num_experts_per_tok is '1'; expected whole numbers"),
        ({"experts_per_layer": [1, "4"]}, "expected a number for each layer"),
        ({"experts_per_layer": []}, "expected a number for each layer"),
    ):
        config.write_text(json.dumps(good | change))
        fails(message)
    config.write_text(json.dumps(good))
    tensors = load_file(model)
    stack = "transformer.h.1.mlp.experts.up_proj"
    save_file(tensors | {stack: tensors[stack][:3].contiguous()}, model)
    fails(rf"{stack} is \[3, 32, 128\], expected \[4, 32, 128\]")
    save_file(tensors, model)
    shutil.copyfile(tmp_path / "sidecar.json", sidecar)
    unstack(export)
    sidecar.unlink()
    tensors, name = load_file(model), "transformer.h.1.mlp.experts.2.c_fc.bias"
    save_file(tensors | {name: tensors[name].bfloat16()}, model)
    fails(f"{name} is bfloat16, the layer's first expert float32")
    save_file(tensors | {name: tensors[name].to(torch.int8)}, model)
    fails(f"{name} is int8, expected floating-point numbers")


def test_what_is_there_stays_and_the_disk_must_have_room(tmp_path, monkeypatch):
    saved = saved_model.save_model(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(CheckpointError, match="mine is there already and not empty"):
        list(run(saved.folder, tmp_path / "mine", "hf"))
    moved = tmp_path / "other.json"
    moved.write_text(saved.tokenizer_file.read_text().replace('"w3"', '"v3"'))
    with pytest.raises(ValueError, match=r"fingerprint \w{12}, but .* was trained with"):
        list(run(saved.folder, tmp_path / "hf", "hf", tokenizer_model=str(moved)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"67 MB are needed, 0 MB are free"):
        list(run(saved.folder, tmp_path / "hf", "hf"))
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron.checkpoint.storage.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was left behind"):
        list(run(saved.folder, tmp_path / "hf", "hf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "mine", "other.json", "tokenizer.json"]
