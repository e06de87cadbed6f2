"""From --data-path and --split to the datasets of a run.

S sequence.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron.config import RunConfig
from megatron.data.blend_order import BlendOrder
from megatron.data.data_state import CORE, CorpusState, DataState
from megatron.data.dataset_checks import (
    SPLITS,
    Blend,
    cache_problems,
    count_tokens,
    damage_problems,
    open_problems,
    parse_blend,
    parse_split,
    split_ranges,
    split_tokens,
    tokenizer_problems,
)
from megatron.data.errors import DataError
from megatron.data.files import INDEX_CACHE
from megatron.data.identity import Identity, identify, vocabulary_problems
from megatron.data.index_file import read_index
from megatron.data.loader import batches
from megatron.data.shuffled_corpus import ShuffledCorpus
from megatron.data.tokenizer import Tokenizer

__all__ = ["Datasets", "GPTSamples", "ResumedData", "batches", "build_datasets"]

logger = logging.getLogger(__name__)


class GPTSamples(Dataset[dict[str, torch.Tensor]]):
    """Samples 0 .. ``length`` - 1 of an endless list of sequences, blended from corpora.

    Items are ``tokens`` [S] and ``labels`` [S] (the tokens one place on), int64, and ``loss_mask`` [S], float32.

    Args:
        corpora: each an endless list itself.
        weights: their shares of the blend.
        length: how many samples this has.
        position: where in the list the blend begins; what comes before cannot be read.
        starts: the sequence with which each corpus begins at ``position``; 0 unless given.
    """

    def __init__(
        self,
        corpora: tuple[ShuffledCorpus, ...],
        weights: tuple[float, ...],
        length: int,
        position: int = 0,
        starts: tuple[int, ...] | None = None,
    ) -> None:
        self._corpora, self._weights, self._length, self._position = corpora, weights, length, position
        self._starts = starts or (0,) * len(corpora)
        self._order = BlendOrder(weights)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not self._position <= index < self._length:
            raise IndexError(f"sample {index} of a dataset that has {self._position} to {self._length - 1}")
        corpus, sequence = self._order[index - self._position]
        tokens = torch.from_numpy(self._corpora[corpus][self._starts[corpus] + sequence])
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(len(tokens) - 1)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": BlendOrder(self._weights)}  # without what it has computed

    def counts(self) -> list[int]:
        """How many of the samples are of each corpus."""
        return self._order.counts(max(self._length - self._position, 0))

    def extended(self, length: int) -> "GPTSamples":
        """The same list with at least ``length`` samples. With torch.distributed initialised every rank must call it.

        Raises:
            DataError: the index of the new ones cannot be written; on all ranks.
        """
        if length <= self._length:
            return self
        longer = GPTSamples(self._corpora, self._weights, length, self._position, self._starts)
        _on_first_rank(longer.prepare)
        return longer

    def prepare(self) -> None:
        """Compute the index of all samples where the cache lacks it; for one process."""
        for corpus, start, count in zip(self._corpora, self._starts, self.counts(), strict=True):
            corpus.prepare(start, start + count)


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The data of a run. ``train`` is None, and ``valid`` and ``test`` are empty, where no sample is wanted."""

    train: Any
    valid: dict[str, Any]
    test: dict[str, Any]
    state: DataState
    """Of the training data; for checkpoints."""
    notes: tuple[str, ...] = ()
    """What to tell the user."""


@dataclasses.dataclass(frozen=True)
class ResumedData:
    """What the checkpoint of a run that is resumed says of its training data."""

    state: DataState | None
    """None in checkpoints of earlier versions, which read their data in megatron.core's order."""
    position: int
    """Of the list, from which the run goes on."""

    def goes_on_with(self, now: DataState, change: bool) -> tuple[DataState, list[str]]:
        """The state of the run that goes on with the training data ``now``, and what there is to say of it.

        Raises:
            DataError: they are other data than the checkpoint's, and ``change`` is not set.
        """
        if self.state is None:
            return dataclasses.replace(now, order=CORE), [
                "the checkpoint does not say what data it was trained on, and is of a version that read data in "
                "megatron.core's order. The run goes on in that order, which depends on --train-tokens and "
                "--global-batch-size: change neither, or some sequences are read twice and others not at all"
            ]
        return self.state.resumed(now, self.position, change)


def build_datasets(
    config: RunConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int], resumed: ResumedData | None = None
) -> Datasets:
    """The training, validation and test data of a run.

    With torch.distributed initialised every rank must call it: rank 0 computes and caches the sample index, the others
    wait and map it into memory.

    Args:
        config: of the run; ``data``, ``model.seq_length`` and ``training.seed`` count.
        tokenizer: of the run; must be the one that the data was made with.
        num_samples: sequences wanted of train, valid and test.
        resumed: where the run goes on from a checkpoint.

    Returns:
        Datasets of exactly ``num_samples`` items; none where no sample is wanted or --split gives no share.

    Raises:
        DataError: with every problem that was found; the same on all ranks.
    """
    blend, shares = parse_blend(config.data.data_path), parse_split(config.data.split)
    if num_samples[0] and not shares[0]:
        raise DataError(f"--split {config.data.split!r} leaves nothing for training")
    wanted = [n if share else 0 for n, share in zip(num_samples, shares, strict=True)]
    cache = Path(config.data.data_cache_path or Path(blend.prefixes[0]).parent / INDEX_CACHE)
    _check(blend, shares, wanted, cache, config, tokenizer)
    identities = _identify(blend.prefixes, cache, tokenizer)

    seed = config.training.seed if resumed is None or resumed.state is None else resumed.state.seed
    states = _states(blend, shares, identities, seed)
    notes: list[str] = []
    if resumed is not None:
        states[0], notes = resumed.goes_on_with(states[0], config.data.change_blend)
    if states[0].order == CORE:
        from megatron.data.core_order import build_core_datasets

        built = build_core_datasets(blend, wanted, cache, config, tokenizer, seed, identities)
    else:
        built = [
            _samples(state, n, config.model.seq_length, tokenizer.vocab_size, cache) if n else None
            for state, n in zip(states, wanted, strict=True)
        ]
        _on_first_rank(lambda: [samples.prepare() for samples in built if samples is not None])
    train, valid, test = built
    return Datasets(
        train,
        {} if valid is None else {"valid": valid},
        {} if test is None else {"test": test},
        states[0],
        tuple(notes),
    )


def _identify(prefixes: list[str], cache: Path, tokenizer: Tokenizer) -> dict[str, Identity]:
    identities = identify(prefixes, cache)
    problems = [
        f"--data-path {problem}"
        for prefix in prefixes
        for problem in vocabulary_problems(prefix, identities[prefix], tokenizer)
    ]
    if problems:
        raise DataError("\n".join(problems))
    return identities


def _states(blend: Blend, shares: list[float], identities: dict[str, Identity], seed: int) -> list[DataState]:
    """Those of a new run's training, validation and test data."""
    weights = blend.weights or [float(count_tokens(prefix)) for prefix in blend.prefixes]
    ranges = [split_ranges(prefix, shares) for prefix in blend.prefixes]
    return [
        DataState.begin(
            seed,
            [
                CorpusState(prefix, identities[prefix].content, *ranges_of_corpus[split], weight)
                for prefix, ranges_of_corpus, weight in zip(blend.prefixes, ranges, weights, strict=True)
            ],
        )
        for split in range(len(SPLITS))
    ]


def _samples(state: DataState, length: int, seq_length: int, vocab_size: int, cache: Path) -> GPTSamples:
    corpora = tuple(
        ShuffledCorpus(
            prefix=corpus.prefix,
            content=corpus.content,
            first=corpus.first,
            last=corpus.last,
            tokens=read_index(corpus.prefix).sum_lengths(corpus.first, corpus.last),
            seq_length=seq_length,
            seed=state.seed,
            vocab_size=vocab_size,
            cache=str(cache),
        )
        for corpus in state.corpora
    )
    weights, starts = zip(*((corpus.weight, corpus.start) for corpus in state.corpora), strict=True)
    return GPTSamples(corpora, weights, length, state.position, starts)


# ------------------------------------------------------------------------------------------------------------ checking


def _check(
    blend: Blend, shares: list[float], wanted: list[int], cache: Path, config: RunConfig, tokenizer: Tokenizer
) -> None:
    """Raise on every rank what any rank finds; only rank 0 looks beyond the files' heads."""
    problems = [problem for prefix in blend.prefixes for problem in open_problems(prefix)]
    if not problems and (not dist.is_initialized() or dist.get_rank() == 0):
        problems += cache_problems(cache)
        for prefix in blend.prefixes:
            if damage := damage_problems(prefix):
                problems += damage
                continue
            problems += tokenizer_problems(prefix, tokenizer, config.data.allow_tokenizer_mismatch)
            problems += _split_problems(prefix, shares, wanted, config, alone=len(blend.prefixes) == 1)
    _raise_together(problems)


def _on_first_rank(function: Callable[[], Any]) -> None:
    """Call ``function`` on rank 0, while the others wait; what it raises all raise."""
    problems = []
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            function()
        except DataError as error:
            problems.append(str(error))
    _raise_together(problems)


def _raise_together(problems: list[str]) -> None:
    if dist.is_initialized():
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, problems)
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
        elif name == "valid" and alone and samples > (tokens - 1) // seq:
            logger.warning(
                "%s has %d sequences, so %d samples repeat some of them", place, (tokens - 1) // seq, samples
            )
    return problems
