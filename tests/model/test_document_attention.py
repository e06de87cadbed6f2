"""Documents of one sequence, kept apart, are what each is on its own."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from megatron.config import DataConfig, ModelConfig, MoEConfig
from megatron.data.documents import cumulative_lengths, restarting_positions, with_documents
from megatron.model import document_attention as module
from megatron.model.document_attention import document_attention
from megatron.model.gpt import GPTModel

SHAPE = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=24,
    init_method_std=0.1,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
VOCAB, EOD = 64, 63
DROPLESS = MoEConfig(num_experts=(4,), topk=2, moe_token_dropping=False)
KINDS = pytest.mark.parametrize("moe", [MoEConfig(), DROPLESS], ids=["dense", "moe"])
# lengths of documents; all but the last one of a sequence end with EOD
PACKED = ((5, 1, 1, 10, 7), (24,), (1, 23), (8, 8, 8))


def sequences(last_ends: bool) -> torch.Tensor:
    """[4, 24], in documents as above; the last one of each ends, too, or is cut off."""
    tokens = torch.randint(EOD, (len(PACKED), 24), generator=torch.Generator().manual_seed(1))
    for row, lengths in zip(tokens, PACKED, strict=True):
        ends = torch.tensor(lengths).cumsum(0) - 1
        row[ends if last_ends else ends[:-1]] = EOD
    return tokens


@KINDS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("last_ends", [False, True])
def test_packed_documents_are_those_documents_on_their_own(moe, recompute, last_ends):
    tokens = sequences(last_ends)
    model = GPTModel(SHAPE, moe, VOCAB, checkpoint_activations=recompute)
    weight = torch.randn(*tokens.shape, VOCAB, generator=torch.Generator().manual_seed(2))
    logits = model(
        tokens,
        position_ids=restarting_positions(tokens, EOD),
        cu_seqlens=cumulative_lengths(tokens, EOD),
    )
    (logits * weight).mean().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, lengths in enumerate(PACKED):
        start = 0
        for length in lengths:
            here = (slice(row, row + 1), slice(start, start + length))
            alone = model(tokens[here])
            torch.testing.assert_close(logits[here], alone, rtol=0, atol=1e-6)
            ((alone * weight[here]).sum() / weight.numel()).backward()
            start += length
    assert packed
    for name, parameter in model.named_parameters():
        if name in packed:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_each_option_acts_alone():
    tokens, model = sequences(False), GPTModel(SHAPE, MoEConfig(), VOCAB).eval()
    first = slice(0, 5)  # the first document of the first sequence
    plain = model(tokens)
    attention = model(tokens, cu_seqlens=cumulative_lengths(tokens, EOD))
    positions = model(tokens, position_ids=restarting_positions(tokens, EOD))
    both = model(tokens, position_ids=restarting_positions(tokens, EOD), cu_seqlens=cumulative_lengths(tokens, EOD))
    for changed in (attention, positions, both):
        torch.testing.assert_close(changed[0, first], plain[0, first], rtol=0, atol=1e-6)
        torch.testing.assert_close(changed[1], plain[1], rtol=0, atol=1e-6)  # one document
    rest = [x[0, 8:] for x in (plain, attention, positions, both)]
    for number, one in enumerate(rest):
        for other in rest[:number]:
            assert (one - other).abs().max() > 1e-3


def test_losses_follow_the_mask():
    tokens, model = sequences(False), GPTModel(SHAPE, MoEConfig(), VOCAB).eval()
    labels = tokens.roll(-1, 1)
    given = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape)}
    made = with_documents(given, DataConfig(eod_mask_loss=True), EOD)
    kept = tokens != EOD
    assert 0 < (~kept).sum() < kept.sum()
    expected = F.cross_entropy(model(tokens)[kept], labels[kept])
    torch.testing.assert_close(model.loss(tokens, labels, made["loss_mask"])[0], expected)


def test_a_cache_goes_with_neither():
    model, tokens = GPTModel(SHAPE, MoEConfig(), VOCAB), sequences(False)
    with pytest.raises(ValueError, match="goes with neither position_ids nor cu_seqlens"):
        model(tokens, cache=object(), cu_seqlens=cumulative_lengths(tokens, EOD))


def qkv(seed: int = 3) -> tuple[torch.Tensor, ...]:
    """Each [B, N, S, D], views of one tensor, as the layer makes them."""
    made = torch.randn(len(PACKED), 24, 3, 2, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return made.permute(2, 0, 3, 1, 4).unbind(0)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention document by document."""
    rows = []
    for row, lengths in enumerate(PACKED):
        pieces = (x[row].split(lengths, dim=1) for x in (q, k, v))
        rows.append(
            torch.cat([F.scaled_dot_product_attention(*p, is_causal=True) for p in zip(*pieces, strict=True)], 1)
        )
    return torch.stack(rows)


def test_masked_attention_is_that_of_each_document():
    y = document_attention(*qkv(), cumulative_lengths(sequences(False), EOD))
    torch.testing.assert_close(y, by_hand(*qkv()), rtol=0, atol=1e-6)


def test_flash_attention_gets_the_documents_one_after_another(monkeypatch):
    """On GPUs tests/gpu/test_documents.py runs the kernel; here its place is taken by a loop over ``cu_seqlens``."""

    def stand_in(q_TND, k_TND, v_TND, cu_q, cu_k, max_q, max_k, *, window_size):
        assert window_size == (-1, 0)
        assert max_q == max_k == 24
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert q_TND.shape == (len(PACKED) * 24, 2, 8)
        bounds = list(zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False))
        documents = ([x[a:b].transpose(0, 1) for x in (q_TND, k_TND, v_TND)] for a, b in bounds if a < b)
        return torch.cat([F.scaled_dot_product_attention(*x, is_causal=True).transpose(0, 1) for x in documents])

    monkeypatch.setattr(module, "_flash_supports", lambda q: True)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    cu_seqlens = cumulative_lengths(sequences(False), EOD)
    torch.testing.assert_close(document_attention(*qkv(), cu_seqlens), by_hand(*qkv()), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"attention dropout 0.1 .* use --attention-dropout 0"):
        document_attention(*qkv(), cu_seqlens, dropout=0.1)


def test_masked_attention_has_dropout():
    shape = dataclasses.replace(SHAPE, attention_dropout=0.5)
    tokens, model = sequences(False), GPTModel(shape, MoEConfig(), VOCAB)
    cu_seqlens = cumulative_lengths(tokens, EOD)
    assert not torch.equal(model(tokens, cu_seqlens=cu_seqlens), model.eval()(tokens, cu_seqlens=cu_seqlens))
