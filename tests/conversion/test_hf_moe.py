"""The exported model with experts in Hugging Face's libraries: devices, disks, recomputation, caches, packed sequences,
interfaces, tracing, Trainer. test_hf_releases.py has more, with other releases of transformers."""

from pathlib import Path

import pytest
import saved_model
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron.config import ModelConfig, MoEConfig
from megatron.conversion.convert import convert
from megatron.conversion.job import Conversion
from megatron.inference.load import find_checkpoint, load_model
from megatron.moe.balancing import learned_buffers

SHAPE = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=48, init_method_std=0.2)
MOE = MoEConfig(
    num_experts=(4,), topk=2, mlp_type="residual", moe_z_loss_coeff=0.01, **saved_model.BALANCING["quantile_balancing"]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> saved_model.SavedModel:
    """A model whose experts have biases, and beside it its export."""
    folder = tmp_path_factory.mktemp("hf_moe")
    saved = saved_model.save_model(folder, MOE, SHAPE)
    list(convert(Conversion(str(saved.folder), str(folder / "hf"), "hf", max_shard_size="100KB")))
    return saved


@pytest.fixture
def folder(saved) -> Path:
    """The export, in several shards."""
    return saved.folder.parent / "hf"


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


def tokens_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(120, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_cache_by_either_name_is_taken(folder):
    model, tokens = load(folder), tokens_of(2, 12)
    expected = model(tokens).logits[:, 8:]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        model(tokens[:, :8], **{name: cache})
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(model(tokens[:, 8:], **{name: cache}).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(tokens, past_key_values=DynamicCache(), cache=DynamicCache())


@pytest.mark.parametrize("name", ["cache_params", "layer_past", "mems", "token_type_ids", "encoder_hidden_states"])
def test_arguments_without_a_meaning_are_refused(folder, name):
    tokens = tokens_of(1, 4)
    with pytest.raises(ValueError, match=f"{name} is no argument of this model"):
        load(folder)(tokens, **{name: tokens})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(folder, attention, use_cache):
    model = load(folder, attn_implementation=attention)
    documents = [tokens_of(length, seed=length) for length in (5, 9, 2, 7)]
    row = torch.cat(documents)[None]
    position_ids = torch.cat([torch.arange(len(document)) for document in documents])[None]
    expected = torch.cat([model(document[None]).logits for document in documents], dim=1)
    actual = model(row, position_ids=position_ids, use_cache=use_cache).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert (model(row).logits - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match="give these without attention_mask"):
        model(row, position_ids=position_ids, attention_mask=torch.ones_like(row))
    with pytest.raises(ValueError, match="cu_seq_lens_q needs position_ids"):
        model(row, cu_seq_lens_q=torch.tensor([0, 5, 14, 16, 23]))


@torch.no_grad()
def test_attention_goes_through_the_interface_with_its_arguments(folder):
    model, tokens, seen = load(folder), tokens_of(2, 12), []
    expected = model(tokens).logits

    def mine(*args, **kwargs):
        seen.append(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    model.set_attn_implementation("mine")
    model(tokens, cu_seq_lens_q=(lengths := torch.tensor([0, 12])), position_ids=(places := torch.arange(12)[None]))
    assert len(seen) == 4
    assert all(kwargs["cu_seq_lens_q"] is lengths and kwargs["position_ids"] is places for kwargs in seen)
    model.set_attn_implementation("eager")
    out = model(tokens, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)
    assert [tuple(layer.shape) for layer in out.attentions] == [(2, 4, 12, 12)] * 4
    for layer in out.attentions:
        assert layer.triu(1).abs().max() == 0
        torch.testing.assert_close(layer.sum(-1), torch.ones(2, 4, 12))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager', but it is 'sdpa'"):
        model(tokens, output_attentions=True)


@torch.no_grad()
def test_experts_go_through_the_interface(folder, monkeypatch):
    model, tokens, calls = load(folder), tokens_of(2, 12), []
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    for kind in ("grouped_mm", "batched_mm"):
        implementation = ALL_EXPERTS_FUNCTIONS[kind]
        monkeypatch.setitem(
            ALL_EXPERTS_FUNCTIONS, kind, lambda *args, f=implementation, k=kind: calls.append(k) or f(*args)
        )
        model.set_experts_implementation(kind)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert calls == 2 * ["grouped_mm"] + 2 * ["batched_mm"]


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@torch.no_grad()
def test_a_traced_model_takes_other_experts_for_other_tokens(folder, experts):
    model = load(folder)
    model.set_experts_implementation(experts)
    router = model.transformer.h[1].mlp.router
    router.weight.zero_()[0] = 1.0  # the example goes to two experts alone
    example, other, longer = tokens_of(1, 1), tokens_of(1, 1, seed=9), tokens_of(1, 9)
    traced = torch.jit.trace(Logits(model), (example,), check_trace=False)
    length = torch.export.Dim("length", min=2, max=48)
    exported = torch.export.export(Logits(model), (tokens_of(1, 3),), dynamic_shapes={"tokens": {1: length}}).module()
    router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(3)))
    for tokens in (example, other, longer):
        torch.testing.assert_close(traced(tokens), model(tokens).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported(longer), model(longer).logits, rtol=0, atol=1e-5)


class Logits(nn.Module):
    """The model as a function of tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


def biases_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of a loaded model, by our names."""
    found = {name: x for name, x in model.named_buffers() if name.endswith((".expert_bias", ".input_mean"))}
    ours = {"transformer.h": "layers", "mlp.balancer": "mlp.router.balancer", "mlp.centering": "mlp.router.centering"}
    for their_name, name in ours.items():
        found = {each.replace(their_name, name): buffer for each, buffer in found.items()}
    return found


def test_biases_decide_the_choice_alone_and_are_not_trained(saved, folder):
    model, tokens = load(folder), tokens_of(3, 20)
    ours = load_model(find_checkpoint(saved.folder))
    plain = saved_model.without_biases(ours)
    changed = (saved_model.choices_of(plain, tokens) != saved_model.choices_of(ours, tokens)).float().mean()
    assert 0.2 < changed < 0.9
    with torch.no_grad():
        out = model(tokens, labels=tokens, output_router_logits=True)
        torch.testing.assert_close(out.logits, ours(tokens), rtol=0, atol=1e-5)
        assert (plain(tokens) - out.logits).abs().max() > 0.1
        _, sums = ours.loss(tokens, tokens)
    assert out.aux_loss.item() == pytest.approx(sums.losses[1].item(), rel=1e-5)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert_same(biases_of(model), learned_buffers(saved.model))
    assert not torch.equal(model.transformer.h[1].mlp.router.weight, ours.layers["1"].mlp.router.weight)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)  # data types too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_stay_in_fp32(saved, folder, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    assert model.transformer.h[1].mlp.router.weight.dtype == dtype
    assert_same(biases_of(model), learned_buffers(saved.model))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype="auto")
    assert_same(biases_of(again), learned_buffers(saved.model))
    assert_same(biases_of(load(folder).to(dtype)), learned_buffers(saved.model))


def test_biases_that_were_not_loaded_are_an_error(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.3.mlp.balancer.expert_bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="expert_bias was not loaded: the model's folder lacks it"):
        load(tmp_path)(tokens_of(1, 4))


def test_trainer_evaluates(folder, tmp_path):
    model = load(folder)
    rows = [{"input_ids": row, "labels": row} for row in tokens_of(4, 16)]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=4)
    loss = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    with torch.no_grad():
        assert loss == pytest.approx(float(model(tokens_of(4, 16), labels=tokens_of(4, 16)).loss), rel=1e-5)


def test_configuration_has_one_number_of_experts(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.num_experts, config.num_local_experts, config.experts_per_layer) == (4, 4, [1, 4, 1, 4])
    with pytest.raises(ValueError, match="num_experts is 8; the largest of experts_per_layer is 4"):
        type(config)(num_hidden_layers=2, experts_per_layer=[1, 4], num_experts=8)
