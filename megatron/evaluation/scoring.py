"""Log-likelihoods of tokens, in batches.

Shapes: B batch, S sequence, H hidden, T scored tokens, V vocabulary (padded).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron.model.gpt import GPTModel

HEAD_ROWS = 1024  # tokens whose logits are in memory at a time


class Scores(NamedTuple):
    """Of the scored tokens of one sequence."""

    log_probabilities: list[float]
    greedy: bool  # whether each is the likeliest


@torch.inference_mode()
def score(model: GPTModel, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Scores]:
    """Score the last ``counts[b]`` tokens of each sequence, given all before them.

    The softmax is over the whole token table, in fp32, as in training.

    Args:
        model: in evaluation mode, on any one device.
        sequences: token ids, one more than the model has positions for at most.
        counts: from 0 up to the sequence's length - 1.

    Raises:
        ValueError: the logits are not finite.
    """
    device = model.embedding.word_embeddings.weight.device
    inputs = [list(sequence[:-1]) or [0] for sequence in sequences]
    longest = max(map(len, inputs))
    tokens_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in inputs], device=device)
    x_BSH, _ = model.hidden_states(tokens_BS)
    rows = [
        (b, position)
        for b, (ids, count) in enumerate(zip(inputs, counts, strict=True))
        for position in range(len(ids) - count, len(ids))
    ]
    where_T2 = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 2)
    x_TH = x_BSH[where_T2[:, 0], where_T2[:, 1]]
    wanted = [token for ids, count in zip(sequences, counts, strict=True) for token in ids[len(ids) - count :]]
    wanted_T = torch.tensor(wanted, dtype=torch.int64, device=device)
    found_T, likeliest_T = [], []
    for x, target in zip(x_TH.split(HEAD_ROWS), wanted_T.split(HEAD_ROWS), strict=True):
        logits_TV = model.head(x).float()
        found_T.append(logits_TV.log_softmax(-1).gather(1, target[:, None])[:, 0])
        likeliest_T.append(logits_TV.argmax(-1) == target)
    found, likeliest = torch.cat(found_T), torch.cat(likeliest_T)
    if not bool(found.isfinite().all()):
        raise ValueError("the model's logits are not finite; its weights are damaged or its training diverged")
    return [
        Scores(f.tolist(), bool(hit.all()))
        for f, hit in zip(found.cpu().split(list(counts)), likeliest.cpu().split(list(counts)), strict=True)
    ]
