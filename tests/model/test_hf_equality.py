"""Logits equal those of Hugging Face's GPT-2 with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import GPT2Config, GPT2LMHeadModel

from megatron.config import ModelConfig, MoEConfig
from megatron.model.gpt import GPTModel

LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.dense",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "wte.weight": "embedding.word_embeddings.weight",
    "wpe.weight": "embedding.position_embeddings.weight",
    "ln_f.weight": "final_layernorm.weight",
    "ln_f.bias": "final_layernorm.bias",
}


def from_hugging_face(reference: GPT2LMHeadModel, vocab_size: int) -> dict[str, torch.Tensor]:
    """Its weights under our names: Conv1D weights are transposed, the token table is padded with large numbers."""
    weights = {}
    for name, tensor in reference.transformer.state_dict().items():
        if name in OUTSIDE:
            weights[OUTSIDE[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        is_conv = kind == "weight" and not part.startswith("ln")
        weights[f"layers.{layer}.{LAYER[part]}.{kind}"] = tensor.T if is_conv else tensor
    table = weights["embedding.word_embeddings.weight"]
    padding = torch.full((vocab_size - len(table), table.size(1)), 3.0)
    weights["embedding.word_embeddings.weight"] = torch.cat([table, padding])
    return weights


def random_reference(layers: int, hidden: int, heads: int, ffn: int | None, vocab: int) -> GPT2LMHeadModel:
    """Large weights, also in biases and norms, so that nothing can be mixed up unseen."""
    torch.manual_seed(layers)
    config = GPT2Config(
        vocab_size=vocab, n_positions=64, n_embd=hidden, n_layer=layers, n_head=heads, n_inner=ffn,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    reference = GPT2LMHeadModel(config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return reference


def real_references() -> list[Path]:
    """GPT-2 checkpoints that Hugging Face's libraries have downloaded to this machine before."""
    configs = Path(HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")
    found = [path.parent for path in configs if json.loads(path.read_text()).get("model_type") == "gpt2"]
    return [path for path in found if list(path.glob("model.safetensors"))]


@pytest.mark.parametrize(
    ("reference", "padded", "length"),
    [
        ((2, 64, 4, None, 128), 128, 32),
        ((3, 48, 3, None, 101), 128, 17),
        ((1, 32, 1, 80, 50), 64, 1),
        ((12, 96, 8, None, 257), 384, 64),
        *((path, 0, 64) for path in real_references()),
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_hugging_face(reference, padded, length):
    real = isinstance(reference, Path)
    reference = GPT2LMHeadModel.from_pretrained(reference) if real else random_reference(*reference)
    config = reference.eval().config
    padded = padded or ModelConfig().padded_vocab_size(config.vocab_size)
    shape = ModelConfig(
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_attention_heads=config.n_head,
        ffn_hidden_size=config.n_inner,
        seq_length=config.n_positions,
        layernorm_epsilon=config.layer_norm_epsilon,
    )
    ours = GPTModel(shape, MoEConfig(), padded).eval()
    ours.load_state_dict(from_hugging_face(reference, padded))
    tokens = torch.randint(config.vocab_size, (2, length))
    expected, actual = reference(tokens).logits, ours(tokens)
    assert actual.shape == (2, length, padded)
    # a real model's logits reach hundreds: there 1e-5 is relative to the largest
    scale = float(expected.abs().max()) if real else 1.0
    torch.testing.assert_close(actual[..., : config.vocab_size], expected, rtol=0, atol=1e-5 * scale)


def test_loss_and_gradients_equal_hugging_face():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    reference = GPT2LMHeadModel(config)
    shape = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, hidden_dropout=0.0, attention_dropout=0.0
    )
    ours = GPTModel(shape, MoEConfig(), 64)
    ours.load_state_dict(from_hugging_face(reference, 64))
    tokens = torch.randint(64, (2, 17))
    logits = reference(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    loss, _ = ours.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for parameter in reference.parameters():
        parameter.data = parameter.grad
    for name, gradient in from_hugging_face(reference, 64).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
