"""What keeps the documents of a sequence apart, from the tokens and the end-of-document token alone.

As in Megatron-LM (``_get_ltor_masks_and_position_ids`` of its GPT dataset), an end-of-document token belongs to the
document that it ends, and a sequence begins a document wherever it is cut out of the corpus.

B micro-batch, S sequence.
"""

import logging
from typing import Any

import numpy as np
import torch

from megatron.config import DataConfig
from megatron.data.corpora import find_corpora
from megatron.data.errors import DataError
from megatron.data.index_file import map_tokens, read_index
from megatron.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DOCUMENT_FIELDS = ("position_ids", "cu_seqlens")
"""Tensors that :func:`with_documents` adds to a micro-batch."""
FLAGS = "--reset-position-ids, --reset-attention-mask and --eod-mask-loss"
_LEAST_DOCUMENTS = 64  # that cu_seqlens has room for
_SAMPLED_DOCUMENTS = 64


def uses_documents(data: DataConfig) -> bool:
    """Whether any option asks where documents end."""
    return data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss


def with_documents(batch: dict[str, Any], data: DataConfig, eod: int | None) -> dict[str, Any]:
    """A micro-batch with what ``data`` asks for, to keep its documents apart.

    Args:
        batch: with ``tokens`` and ``loss_mask``, [B, S].
        data: ``reset_position_ids``, ``reset_attention_mask`` and ``eod_mask_loss`` count.
        eod: the end-of-document token.

    Returns:
        The batch, with ``position_ids``, int64 [B, S], for ``reset_position_ids``; ``cu_seqlens`` of
        :func:`cumulative_lengths` for ``reset_attention_mask``; and for ``eod_mask_loss`` a ``loss_mask`` that is 0
        where the token is ``eod``, whose label is the first token of another document.

    Raises:
        ValueError: an option needs ``eod``, and it is None.
    """
    if not uses_documents(data):
        return batch
    if eod is None:
        raise ValueError(f"{FLAGS} need the tokenizer's end-of-document token; got None")
    tokens, made = batch["tokens"], dict(batch)
    if data.reset_position_ids:
        made["position_ids"] = restarting_positions(tokens, eod)
    if data.reset_attention_mask:
        made["cu_seqlens"] = cumulative_lengths(tokens, eod)
    if data.eod_mask_loss:
        made["loss_mask"] = batch["loss_mask"].masked_fill(tokens == eod, 0.0)
    return made


def restarting_positions(tokens_BS: torch.Tensor, eod: int) -> torch.Tensor:
    """The position of each token in its document, int64 [B, S], from 0."""
    position_S = torch.arange(tokens_BS.size(1))
    begin_BS = torch.where(_begins(tokens_BS, eod), position_S, 0).cummax(1).values
    return position_S - begin_BS


def cumulative_lengths(tokens_BS: torch.Tensor, eod: int) -> torch.Tensor:
    """Where the documents of the sequences, laid end to end, begin and end: 0, d1, d1 + d2, ..., B * S; int32 [N + 1].

    Documents of no tokens follow the last one, so that N is a power of two: compiled code sees few different shapes.
    """
    begins = _begins(tokens_BS, eod).flatten().nonzero()[:, 0]
    room = max(_LEAST_DOCUMENTS, 1 << (len(begins) - 1).bit_length())
    lengths = torch.full((room + 1,), tokens_BS.numel(), dtype=torch.int32)
    lengths[: len(begins)] = begins
    return lengths


def _begins(tokens_BS: torch.Tensor, eod: int) -> torch.Tensor:
    """Whether a token is the first of its document."""
    begins = torch.ones_like(tokens_BS, dtype=torch.bool)
    begins[:, 1:] = tokens_BS[:, :-1] == eod
    return begins


def check_documents(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Look at the ends of some documents of each corpus, if ``data`` asks where documents end.

    Raises:
        DataError: none of a corpus's documents ends with the tokenizer's end-of-document token.
    """
    if not uses_documents(data):
        return
    problems = []
    for prefix, flag in find_corpora(data).prefixes().items():
        ended, looked_at = _ended(prefix, tokenizer.eod)
        if looked_at and not ended:
            problems.append(
                f"{flag} {prefix}: none of {looked_at} documents looked at ends with the end-of-document token "
                f"{tokenizer.eod}, by which {FLAGS} tell documents apart; preprocess with --append-eod, or drop these "
                "flags"
            )
        elif ended < looked_at:
            logger.warning(
                "%s %s: %d of %d documents looked at do not end with the end-of-document token %d; each "
                "counts as one document with the next",
                *(flag, prefix, looked_at - ended, looked_at, tokenizer.eod),
            )
    if problems:
        raise DataError("\n".join(problems))


def _ended(prefix: str, eod: int) -> tuple[int, int]:
    """Of some documents of a corpus, how many end with ``eod``; and how many were looked at."""
    index = read_index(prefix)
    tokens = map_tokens(prefix, index)
    ended = looked_at = 0
    for document in np.unique(np.linspace(0, index.documents - 1, _SAMPLED_DOCUMENTS, dtype=np.int64)):
        last = int(index.ends[document + 1]) - 1  # sequence of the document
        if last >= index.ends[document] and index.lengths[last]:
            looked_at += 1
            ended += int(tokens[int(index.offsets[last]) // index.dtype.itemsize + int(index.lengths[last]) - 1]) == eod
    return ended, looked_at
