"""From --data-path and --split to the datasets of a run.

S sequence.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron.config import RunConfig
from megatron.data.dataset_checks import (
    SPLITS,
    Blend,
    cache_problems,
    count_tokens,
    damage_problems,
    open_problems,
    parse_blend,
    parse_split,
    split_tokens,
    token_problems,
)
from megatron.data.errors import DataError
from megatron.data.files import INDEX_CACHE
from megatron.data.loader import FIELDS, batches
from megatron.data.tokenizer import Tokenizer

__all__ = ["GPTSamples", "batches", "build_datasets"]

logger = logging.getLogger(__name__)

# A run that reads its data more often than this is a mistake, and its sample index would not fit into memory.
_MOST_EPOCHS = 1000


class GPTSamples(Dataset[dict[str, torch.Tensor]]):
    """Samples 0 .. num_samples - 1 of one split, in the order of the run.

    Items are ``tokens`` [S] and ``labels`` [S] (the tokens one place on), int64, and ``loss_mask`` [S], float32. The
    dataset below repeats its documents, each time in another order, for as many epochs as ``num_samples`` takes.
    """

    def __init__(self, source: Any, num_samples: int) -> None:
        self._source, self._num_samples = source, num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of a dataset of {self._num_samples}")
        item = self._source[index]
        return {name: item[name] for name in FIELDS}


def build_datasets(
    config: RunConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int]
) -> tuple[GPTSamples | None, GPTSamples | None, GPTSamples | None]:
    """The training, validation and test data of a run.

    With torch.distributed initialised every rank must call it: rank 0 computes and caches the sample index, the others
    wait and map it into memory.

    Args:
        config: of the run; ``data``, ``model.seq_length`` and ``training.seed`` count.
        tokenizer: of the run; must be the one that the data was made with.
        num_samples: sequences wanted of train, valid and test.

    Returns:
        Three datasets of exactly ``num_samples`` items; None where no sample is wanted or --split gives no share.

    Raises:
        DataError: with every problem that was found; the same on all ranks.
    """
    blend, shares = parse_blend(config.data.data_path), parse_split(config.data.split)
    if num_samples[0] and not shares[0]:
        raise DataError(f"--split {config.data.split!r} leaves nothing for training")
    wanted = [n if share else 0 for n, share in zip(num_samples, shares, strict=True)]
    cache = Path(config.data.data_cache_path or Path(blend.prefixes[0]).parent / INDEX_CACHE)
    _check(blend, shares, wanted, cache, config, tokenizer)

    sources = _build(blend, wanted, cache, config, tokenizer)
    return tuple(  # type: ignore[return-value]
        GPTSamples(source, n) if n else None for source, n in zip(sources, wanted, strict=True)
    )


# ------------------------------------------------------------------------------------------------------------ building


@dataclasses.dataclass(frozen=True)
class _CoreTokenizer:
    """What megatron.core's datasets want to know of a tokenizer; no pad token, as our samples are always full."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]


def _build(blend: Blend, wanted: list[int], cache: Path, config: RunConfig, tokenizer: Tokenizer) -> list[Any]:
    from megatron.data.core_datasets import GPTDatasetConfig
    from megatron.data.index_cache import CachedDatasetBuilder, CachedGPTDataset

    identity = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    weights = blend.weights
    if weights is None and len(blend.prefixes) > 1:
        weights = [float(count_tokens(prefix)) for prefix in blend.prefixes]
    if len(blend.prefixes) == 1:
        weights = None
    core = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.model.seq_length,
        blend=(blend.prefixes, weights),
        split=config.data.split,
        path_to_cache=str(cache),
        tokenizer=_CoreTokenizer(tokenizer.vocab_size, tokenizer.eod, identity),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.0,  # CachedGPTDataset has its own
    )
    for index, samples in enumerate(wanted):
        if not samples:
            core.split_matrix[index] = None
    return CachedDatasetBuilder(CachedGPTDataset, wanted, lambda: True, core).build()


def _check(
    blend: Blend, shares: list[float], wanted: list[int], cache: Path, config: RunConfig, tokenizer: Tokenizer
) -> None:
    """Raise on every rank what any rank finds; only rank 0 looks beyond the files' heads."""
    distributed = torch.distributed.is_initialized()
    problems = [problem for prefix in blend.prefixes for problem in open_problems(prefix)]
    if not problems and (not distributed or torch.distributed.get_rank() == 0):
        problems += cache_problems(cache)
        for prefix in blend.prefixes:
            if damage := damage_problems(prefix):
                problems += damage
                continue
            problems += token_problems(prefix, tokenizer, config.data.allow_tokenizer_mismatch)
            problems += _split_problems(prefix, shares, wanted, config, alone=len(blend.prefixes) == 1)
    if distributed:
        found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(found, problems)
        problems = list(dict.fromkeys(problem for rank in found for problem in rank))
    if problems:
        raise DataError("\n".join(problems))


def _split_problems(prefix: str, shares: list[float], wanted: list[int], config: RunConfig, alone: bool) -> list[str]:
    problems = []
    seq, split = config.model.seq_length, config.data.split
    for name, (documents, tokens), samples in zip(SPLITS, split_tokens(prefix, shares), wanted, strict=True):
        if not samples:
            continue
        place = f"--data-path {prefix}, --split {split}: the {name} split"
        if not documents:
            problems.append(f"{place} gets no document. Give it a larger share, or 0 to do without it")
        elif tokens < seq + 1:
            problems.append(
                f"{place} has {tokens} tokens in {documents} documents, but one sample takes {seq + 1} "
                f"(--seq-length {seq}, and one for the last label). Give it a larger share or more data"
            )
        elif alone and samples * seq > _MOST_EPOCHS * tokens:
            problems.append(
                f"{place} has {tokens} tokens, and {samples} samples of {seq} would read them "
                f"{samples * seq // tokens} times; give more data or a smaller --train-tokens"
            )
        elif name == "valid" and alone and samples > (tokens - 1) // seq:
            logger.warning(
                "%s has %d sequences, so %d samples repeat some of them", place, (tokens - 1) // seq, samples
            )
    return problems
