"""The exported model with experts under the tools of Hugging Face's libraries: devices, disks, recomputation."""

from pathlib import Path

import pytest
import saved_model
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from megatron.checkpoint.formats.convert import Conversion, convert
from megatron.config import ModelConfig, MoEConfig

SHAPE = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=48, init_method_std=0.2)
MOE = MoEConfig(num_experts=(4,), topk=2, mlp_type="residual", moe_z_loss_coeff=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An export in several shards."""
    folder = tmp_path_factory.mktemp("hf_moe")
    saved = saved_model.save_model(folder, MOE, SHAPE)
    list(convert(Conversion(str(saved.folder), str(folder / "hf"), "hf", max_shard_size="100KB")))
    return folder / "hf"


def load(folder: Path, **options: object) -> nn.Module:
    """The model, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)
    assert type(model).__name__ == "GPTMoEForCausalLM"
    return model.eval()


PLACES = {
    "auto": {"device_map": "auto"},
    "cpu": {"device_map": "cpu"},
    "disk by layer": {
        "device_map": {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "lm_head": "cpu"}
        | {f"transformer.h.{n}": "disk" if n % 2 else "cpu" for n in range(4)} | {"transformer.ln_f": "disk"}
    },
    "disk by size": {"device_map": "auto", "max_memory": {"cpu": 350_000}},
}  # fmt: skip


@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
@torch.no_grad()
def test_logits_and_text_are_the_same_wherever_the_layers_are(folder, tmp_path, options):
    whole, placed = load(folder), load(folder, **options, offload_folder=str(tmp_path))
    places = getattr(placed, "hf_device_map", {"": "cpu"})
    on_disk = {name for name, device in places.items() if device == "disk"}
    assert bool(on_disk) == ("max_memory" in options or isinstance(options["device_map"], dict)), places
    assert not [name for name in places if name.startswith("transformer.h.") and name.count(".") > 2], "a layer was cut"
    assert {name for name, p in placed.named_parameters() if p.device.type == "meta"} == {
        name for name, _ in whole.named_parameters() if any(name.startswith(f"{place}.") for place in on_disk)
    }
    tokens = torch.randint(122, (3, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(placed(tokens).logits, whole(tokens).logits, rtol=0, atol=1e-6)
    texts = [m.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12) for m in (placed, whole)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_no_gradient(folder, reentrant):
    model = load(folder).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    tokens = torch.randint(122, (2, 16), generator=torch.Generator().manual_seed(1))
    calls = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[int, dict[str, torch.Tensor]]:
        calls.clear()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return len(calls), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    once, plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    twice, recomputed = gradients()
    assert (once, twice) == (4, 8)
    assert recomputed.keys() == plain.keys()  # an expert without a token has none
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    model.gradient_checkpointing_disable()
    assert gradients()[0] == 4
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        model.eval()(tokens)  # recomputation is of training alone
