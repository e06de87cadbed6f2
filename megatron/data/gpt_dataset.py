"""From the flags that name a run's corpora to its datasets.

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

from megatron.config import DataConfig, RunConfig
from megatron.data.blend_order import BlendOrder
from megatron.data.corpora import Corpora, Source, find_corpora
from megatron.data.data_state import CORE, NO_CHANGE_IN_CORE_ORDER, CorpusState, DataState, corpus_states
from megatron.data.dataset_checks import (
    cache_problems,
    damage_problems,
    flag_differences,
    open_problems,
    tokenizer_problems,
)
from megatron.data.errors import DataError
from megatron.data.files import INDEX_CACHE
from megatron.data.identity import Identity, identify, vocabulary_problems
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
    """The data of a run. ``train`` is None, and ``valid`` and ``test`` are empty, where no sample is wanted.

    Validation and test sets are in the order of the command line, by name; those of --split and blends are called
    "valid" and "test".
    """

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
    flags: DataConfig | None = None
    """The options of the checkpoint's run. Without ``state``, they are all that is known of its data."""

    def goes_on_with(self, now: DataState, flags: DataConfig) -> tuple[DataState, list[str]]:
        """The state of the run that goes on with the training data ``now`` and its options, and what to tell the user.

        Raises:
            DataError: they are other data than the checkpoint's, and ``--change-blend`` is not set or cannot be done.
        """
        if self.state is not None:
            state, notes = self.state.resumed(now, self.position, flags.change_blend)
        elif flags.change_blend:
            raise DataError(NO_CHANGE_IN_CORE_ORDER)
        else:
            state = dataclasses.replace(now, order=CORE)
            notes = [
                "the checkpoint is of a version that did not record the content of its data. They must be those that "
                "it was trained on; from now on this is checked"
            ]
            if self.flags is not None:
                notes += flag_differences(self.flags, flags)
        if state.order == CORE:
            notes.append(
                "the run began with a version that read data in megatron.core's order, and goes on in it. That order "
                "depends on --train-tokens and --global-batch-size: change neither, or some sequences are read twice "
                "and others not at all"
            )
        return state, notes


def build_datasets(
    config: RunConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int], resumed: ResumedData | None = None
) -> Datasets:
    """The training, validation and test data of a run.

    With torch.distributed initialised every rank must call it: rank 0 computes and caches the sample index, the others
    wait and map it into memory.

    Args:
        config: of the run; ``data``, ``model.seq_length`` and ``training.seed`` count.
        tokenizer: of the run; must be the one that the data was made with.
        num_samples: sequences wanted of the training data, of each validation set and of each test set.
        resumed: where the run goes on from a checkpoint.

    Returns:
        Datasets of exactly ``num_samples`` items; none where no sample is wanted.

    Raises:
        DataError: with every problem that was found; the same on all ranks.
    """
    corpora = find_corpora(config.data)
    sets = _sets(corpora, num_samples)
    cache = Path(config.data.data_cache_path or Path(corpora.train.blend.prefixes[0]).parent / INDEX_CACHE)
    _check(corpora, sets, cache, config, tokenizer)
    identities = _identify(corpora, cache, tokenizer)

    seed = config.training.seed if resumed is None or resumed.state is None else resumed.state.seed
    state, notes = _state(corpora.train, identities, seed), []
    if resumed is not None:
        state, notes = resumed.goes_on_with(state, config.data)
    if state.order == CORE:
        built = _build_core(corpora, num_samples, cache, config, tokenizer, seed, identities)
    else:
        built = {}
        for kind, name, source, n in sets:
            of_set = state if kind == "train" else _state(source, identities, seed)
            built[kind, name] = _samples(of_set, n, config.model.seq_length, tokenizer.vocab_size, cache)
        _on_first_rank(lambda: [samples.prepare() for samples in built.values()])
    valid, test = ({name: built[of, name] for of, name in built if of == kind} for kind in ("valid", "test"))
    return Datasets(built.get(("train", "train")), valid, test, state, tuple(notes))


_Sets = list[tuple[str, str, Source, int]]  # train, valid or test; the name of the set; how many sequences of it


def _sets(corpora: Corpora, num_samples: tuple[int, int, int]) -> _Sets:
    """The sets of which sequences are wanted."""
    kinds = (("train", {"train": corpora.train}), ("valid", corpora.valid), ("test", corpora.test))
    return [
        (kind, name, source, n)
        for (kind, sources), n in zip(kinds, num_samples, strict=True)
        for name, source in sources.items()
        if n
    ]


def _build_core(
    corpora: Corpora,
    num_samples: tuple[int, int, int],
    cache: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    seed: int,
    identities: dict[str, Identity],
) -> dict[tuple[str, str], Any]:
    from megatron.data.core_order import build_core_datasets

    if not config.data.data_path:
        raise DataError(
            "the run goes on from a checkpoint of a version that had no --train-data-path, in the order of "
            "megatron.core; give the --data-path and --split that it began with, or begin a new run with the "
            "checkpoint's weights (--finetune)"
        )
    sources = (corpora.train, corpora.valid.get("valid"), corpora.test.get("test"))
    wanted = [n if source else 0 for source, n in zip(sources, num_samples, strict=True)]
    found = build_core_datasets(corpora.train.blend, wanted, cache, config, tokenizer, seed, identities)
    return {(kind, kind): samples for kind, samples in zip(("train", "valid", "test"), found, strict=True) if samples}


def _identify(corpora: Corpora, cache: Path, tokenizer: Tokenizer) -> dict[str, Identity]:
    flags = corpora.prefixes()
    identities = identify(flags, cache)
    problems = [
        problem
        for prefix, flag in flags.items()
        for problem in vocabulary_problems(prefix, identities[prefix], tokenizer, flag)
    ]
    if problems:
        raise DataError("\n".join(problems))
    return identities


def _state(source: Source, identities: dict[str, Identity], seed: int) -> DataState:
    """That of a new run which reads ``source``."""
    contents = {prefix: identity.content for prefix, identity in identities.items()}
    return DataState.begin(seed, corpus_states(source, contents))


def _samples(state: DataState, length: int, seq_length: int, vocab_size: int, cache: Path) -> GPTSamples:
    corpora = tuple(
        ShuffledCorpus(
            prefix=corpus.prefix,
            content=corpus.content,
            first=corpus.first,
            last=corpus.last,
            tokens=corpus.count_tokens(),
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


def _check(corpora: Corpora, sets: _Sets, cache: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise on every rank what any rank finds; only rank 0 looks beyond the files' heads."""
    flags = corpora.prefixes()
    problems = [problem for prefix, flag in flags.items() for problem in open_problems(prefix, flag)]
    if not problems and (not dist.is_initialized() or dist.get_rank() == 0):
        problems += cache_problems(cache)
        damaged = {prefix: found for prefix, flag in flags.items() if (found := damage_problems(prefix, flag))}
        for prefix, flag in flags.items():
            allow = config.data.allow_tokenizer_mismatch
            problems += damaged.get(prefix) or tokenizer_problems(prefix, tokenizer, allow, flag)
        for kind, _, source, n in sets:
            for corpus in corpus_states(source, damaged=damaged):
                problems += _size_problems(corpus, kind, source, n, config)
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


def _size_problems(corpus: CorpusState, kind: str, source: Source, samples: int, config: RunConfig) -> list[str]:
    """Why no sequence can be made of a corpus; warns where a set is read more than once at a time."""
    seq, split = config.model.seq_length, config.data.split
    tokens, documents = corpus.count_tokens(), corpus.last - corpus.first
    name, fix = f"{source.flag} {corpus.prefix}", "Give more data"
    if source.flag == "--data-path":
        name, fix = f"{name}, --split {split}: the {kind} split", "Give it a larger share or more data"
    if not documents:
        return [f"{name} gets no document. Give it a larger share, or 0 to do without it"]
    if tokens < seq + 1:
        return [
            f"{name} has {tokens} tokens in {documents} documents, but one sample takes {seq + 1} "
            f"(--seq-length {seq}, and one for the last label). {fix}"
        ]
    if kind != "train" and len(source.blend.prefixes) == 1 and samples > (tokens - 1) // seq:
        logger.warning("%s has %d sequences, so %d samples repeat some of them", name, (tokens - 1) // seq, samples)
    return []
