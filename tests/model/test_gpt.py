import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megatron.config import ModelConfig, MoEConfig
from megatron.model.gpt import GPTModel
from megatron.model.loss import cross_entropy, sum_moe_losses

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=16,
    init_method_std=0.1,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
DENSE, EXPERTS = MoEConfig(), MoEConfig(num_experts=(4,), moe_loss_coeff=0.01, moe_z_loss_coeff=0.001)
KINDS = pytest.mark.parametrize("moe", [DENSE, EXPERTS], ids=["dense", "moe"])
VOCAB = 96


def batch(seed: int = 0, length: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (2, length + 1), generator=g)
    mask = (torch.rand(2, length, generator=g) > 0.3).float()
    return {"tokens_BS": tokens[:, :-1], "labels_BS": tokens[:, 1:], "loss_mask_BS": mask}


@KINDS
def test_parameter_names(moe):
    names = set(GPTModel(SMALL, moe, VOCAB).state_dict())
    both = ("weight", "bias")
    expected = {"embedding.word_embeddings.weight", "embedding.position_embeddings.weight"}
    expected |= {f"final_layernorm.{kind}" for kind in both}
    for layer in range(4):
        parts = ["input_layernorm", "attention.qkv", "attention.dense", "post_attention_layernorm"]
        if moe.is_moe_layer(layer):
            expected |= {f"layers.{layer}.mlp.experts.{name}" for name in ("w1", "b1", "w2", "b2")}
            expected.add(f"layers.{layer}.mlp.router.weight")
        else:
            parts += ["mlp.fc1", "mlp.fc2"]
        expected |= {f"layers.{layer}.{part}.{kind}" for part in parts for kind in both}
    assert names == expected


@KINDS
def test_loss_is_the_mean_over_the_mask(moe):
    model, data = GPTModel(SMALL, moe, VOCAB).eval(), batch()
    loss, sums = model.loss(**data)
    lm_loss, aux_loss, z_loss, micro_batches = sums.losses
    per_token = F.cross_entropy(model(data["tokens_BS"]).transpose(1, 2), data["labels_BS"], reduction="none")
    mask = data["loss_mask_BS"]
    torch.testing.assert_close(lm_loss, ((per_token * mask).sum() / mask.sum()).detach())
    torch.testing.assert_close(loss.detach(), lm_loss + 0.01 * aux_loss + 0.001 * z_loss)
    assert loss.dtype == sums.losses.dtype == torch.float32
    assert lm_loss.item() == pytest.approx(math.log(VOCAB), abs=1.0)
    assert micro_batches == 1
    assert (min(aux_loss, z_loss) > 0) == (moe is EXPERTS)


def test_routing_is_reported_for_each_moe_layer():
    data = batch()
    _, sums = GPTModel(SMALL, MoEConfig(num_experts=(2, 4)), VOCAB).eval().loss(**data)
    assert [len(counts) for counts in sums.counts] == [2, 4]
    assert [int(counts.sum()) for counts in sums.counts] == [24, 24]
    assert sums.dropped.tolist() == [0, 0]
    assert sums.dropped.dtype == torch.int64
    assert sums.losses[1] > 1.0
    _, dense = GPTModel(SMALL, DENSE, VOCAB).eval().loss(**data)
    assert (dense.counts, dense.dropped.tolist()) == ([], [])
    assert dense.losses[1:3].tolist() == [0.0, 0.0]


@KINDS
def test_every_parameter_gets_a_gradient(moe):
    model = GPTModel(SMALL, dataclasses.replace(moe, moe_token_dropping=False), VOCAB)
    model.loss(**batch(length=16))[0].backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name


@KINDS
def test_gradient_is_the_slope_of_the_loss(moe):
    model, data = GPTModel(SMALL, moe, VOCAB).double().eval(), batch()
    model.loss(**data)[0].backward()
    g = torch.Generator().manual_seed(1)
    slope, step = 0.0, 1e-6
    moves = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in model.parameters()]
    losses = []
    with torch.no_grad():
        slope = sum((p.grad * move).sum() for p, move in zip(model.parameters(), moves, strict=True))
        for direction in (1.0, -2.0):
            for p, move in zip(model.parameters(), moves, strict=True):
                p += direction * step * move
            losses.append(model.loss(**data)[0])
    # float32 in the router bounds the precision of an MoE model's loss
    tolerance = 1e-6 if moe is DENSE else 1e-2
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(slope), rel=tolerance)


@KINDS
def test_recomputed_activations_give_the_same_gradients_with_dropout(moe):
    config = dataclasses.replace(SMALL, hidden_dropout=0.2, attention_dropout=0.2)
    results = []
    for recompute in (False, True):
        model = GPTModel(config, moe, VOCAB, checkpoint_activations=recompute)
        torch.manual_seed(5)
        loss, sums = model.loss(**batch())
        loss.backward()
        results.append((dataclasses.astuple(sums), [p.grad for p in model.parameters()]))
    (kept, kept_grads), (recomputed, recomputed_grads) = results
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)
    torch.testing.assert_close(recomputed_grads, kept_grads, rtol=0, atol=0)


def test_recomputing_keeps_less_for_the_backward_pass():
    def kept(recompute: bool) -> int:
        sizes = []
        model = GPTModel(SMALL, DENSE, VOCAB, checkpoint_activations=recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.loss(**batch(length=16))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@KINDS
def test_stages_one_after_the_other_are_the_whole_model(moe):
    """With dropout, so what a layer draws does not depend on its stage either."""
    config = dataclasses.replace(SMALL, hidden_dropout=0.2, attention_dropout=0.2)
    ranges = [range(1), range(1, 3), range(3, 4)]
    whole = GPTModel(config, moe, VOCAB, seed=3)
    stages = [
        GPTModel(config, moe, VOCAB, seed=3, layers=layers, with_embedding=layers[0] == 0, with_head=layers[-1] == 3)
        for layers in ranges
    ]
    theirs = dict(whole.named_parameters())
    parts = [dict(stage.named_parameters()) for stage in stages]
    assert set().union(*parts) == set(theirs)
    assert sum(map(len, parts)) == len(theirs) + 1, "the token table is there twice"
    for part in parts:
        assert all(torch.equal(value, theirs[name]) for name, value in part.items())
    data = batch()
    torch.manual_seed(5)
    loss, sums = whole.loss(**data)
    loss.backward()
    x, moe_loss, told = data["tokens_BS"], 0.0, {}
    for stage in stages:
        torch.manual_seed(5)
        x, stats = stage.hidden_states(x)
        moe_loss, told = moe_loss + stage.moe_loss(*sum_moe_losses(stats.values())), told | stats
    lm_loss = cross_entropy(stages[-1].head(x), data["labels_BS"], data["loss_mask_BS"])
    (lm_loss + moe_loss).backward()
    assert torch.equal(lm_loss, sums.losses[0])
    assert list(told) == [layer for layer in range(4) if moe.is_moe_layer(layer)]
    assert all(torch.equal(mine.counts_E, counts) for mine, counts in zip(told.values(), sums.counts, strict=True))
    table = "embedding.word_embeddings.weight"
    torch.testing.assert_close(parts[0][table].grad + parts[2][table].grad, theirs.pop(table).grad)
    for name, parameter in theirs.items():
        assert all(torch.equal(part[name].grad, parameter.grad) for part in parts if name in part), name


def test_a_stage_without_the_head_gives_no_logits():
    stage = GPTModel(SMALL, DENSE, VOCAB, layers=range(2), with_head=False)
    for function in (stage, lambda tokens: stage.loss(tokens, tokens)):
        with pytest.raises(ValueError, match="this pipeline stage has no head"):
            function(batch()["tokens_BS"])


def test_dropout_is_active_in_training_only():
    model = GPTModel(dataclasses.replace(SMALL, hidden_dropout=0.5, attention_dropout=0.5), DENSE, VOCAB)
    tokens = batch()["tokens_BS"]
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("which", ["hidden_dropout", "attention_dropout"])
def test_each_dropout_acts_alone(which):
    model = GPTModel(dataclasses.replace(SMALL, **{which: 0.5}), DENSE, VOCAB)
    tokens = batch()["tokens_BS"]
    assert not torch.equal(model(tokens), model(tokens))


@KINDS
def test_no_token_sees_a_later_one(moe):
    model, tokens = GPTModel(SMALL, moe, VOCAB).eval(), batch()["tokens_BS"]
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amin(dim=(0, 2)).max() > 1e-6


@KINDS
def test_training_lowers_the_loss(moe):
    model, data = GPTModel(SMALL, moe, VOCAB), batch(length=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(30):
        loss, sums = model.loss(**data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sums.losses[0] < 1.0


@KINDS
def test_bf16_stays_near_fp32(moe):
    model, data = GPTModel(SMALL, moe, VOCAB).eval(), batch()
    exact, _ = model.loss(**data)
    model.to(torch.bfloat16)
    assert model(data["tokens_BS"]).dtype == torch.bfloat16
    rounded, _ = model.loss(**data)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match=r"17 tokens .* 16 rows.*--max-position-embeddings 17"):
        GPTModel(SMALL, DENSE, VOCAB)(torch.zeros(1, 17, dtype=torch.int64))


def test_a_longer_position_table_allows_longer_sequences():
    model = GPTModel(dataclasses.replace(SMALL, max_position_embeddings=20), DENSE, VOCAB)
    assert model(torch.zeros(1, 20, dtype=torch.int64)).shape == (1, 20, VOCAB)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="32 does not divide by num_attention_heads 5"):
        GPTModel(dataclasses.replace(SMALL, num_attention_heads=5), DENSE, VOCAB)


def test_expert_group_is_asked_for_moe_layers_only():
    asked = []

    def expert_group(place):
        from megatron.parallel.groups import ExpertGroup

        asked.append(place)
        return ExpertGroup(1, 0, None)

    GPTModel(SMALL, MoEConfig(num_experts=(2, 4)), VOCAB, expert_group)
    GPTModel(SMALL, MoEConfig(num_experts=(1, 6)), VOCAB, expert_group)
    assert asked == [0, 1, 1], "layers are named by their place among the MoE layers"
