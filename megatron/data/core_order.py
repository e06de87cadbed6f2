"""The order of the data of earlier versions, in which runs that began with it go on.

megatron.core shuffles all epochs of a corpus at once, so what comes first depends on how many samples are wanted. Its
index is kept in .npy files that rank 0 writes; when such a dataset is sent to a loader process only their names travel.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron.config import RunConfig
from megatron.data.core_datasets import BlendedDataset, BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig
from megatron.data.corpora import Blend
from megatron.data.dataset_checks import weights_of
from megatron.data.errors import DataError
from megatron.data.identity import Identity
from megatron.data.index_cache import is_whole, publish
from megatron.data.loader import SAMPLE_FIELDS
from megatron.data.tokenizer import Tokenizer


class CoreSamples(Dataset[dict[str, torch.Tensor]]):
    """Samples 0 .. ``length`` - 1 of a dataset of megatron.core; items as those of
    :class:`megatron.data.gpt_dataset.GPTSamples`."""

    def __init__(self, source: Any, length: int, vocab_size: int) -> None:
        self._source, self._length, self._vocab_size = source, length, vocab_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of a dataset of {self._length}")
        item = self._source[index]
        if (highest := int(item["labels"].max())) >= self._vocab_size:
            raise DataError(
                f"sample {index} holds token {highest}, expected 0 to {self._vocab_size - 1}; the .bin has changed "
                "since the run began"
            )
        return {name: item[name] for name in SAMPLE_FIELDS}

    def extended(self, length: int) -> "CoreSamples":
        """This dataset; another number of samples would be in another order."""
        return self


@dataclasses.dataclass(frozen=True)
class _CoreTokenizer:
    """What megatron.core's datasets want to know of a tokenizer; no pad token, as our samples are always full."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, Any]


def build_core_datasets(
    blend: Blend,
    wanted: list[int],
    cache: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    seed: int,
    identities: dict[str, Identity],
) -> list[CoreSamples | None]:
    """Train, valid and test, each None where no sample is wanted."""
    contents = [identities[prefix].content for prefix in blend.prefixes]
    identity = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint, "contents": contents}
    weights = weights_of(blend) if len(blend.prefixes) > 1 else None
    core_tokenizer: Any = _CoreTokenizer(tokenizer.vocab_size, tokenizer.eod, identity)
    core: Any = GPTDatasetConfig(  # Any: its annotations allow neither our tokenizer nor a split of None
        random_seed=seed,
        sequence_length=config.model.seq_length,
        blend=(blend.prefixes, weights),
        split=config.data.split,
        path_to_cache=str(cache),
        tokenizer=core_tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.0,  # CachedGPTDataset has its own
    )
    for index, samples in enumerate(wanted):
        if not samples:
            core.split_matrix[index] = None
    built = CachedDatasetBuilder(CachedGPTDataset, wanted, lambda: True, core).build()
    return [
        CoreSamples(source, n, tokenizer.vocab_size) if n else None for source, n in zip(built, wanted, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """Stands for a memory-mapped array while its owner is pickled."""

    path: str


class _LightPickle:
    """Pickles memory-mapped index arrays as their paths."""

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name, value in state.items():
            if isinstance(value, np.memmap):
                state[name] = _Mapped(str(value.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, _Mapped):
                state[name] = np.load(value.path, mmap_mode="r")
        self.__dict__.update(state)


class CachedGPTDataset(_LightPickle, GPTDataset):
    """One .bin/.idx and one split of it; arguments as megatron.core's."""

    def __init__(
        self, dataset: Any, path: str, documents: np.ndarray, num_samples: int, split: Any, config: GPTDatasetConfig
    ) -> None:
        # A blend of n datasets rounds each share up and its running choice overshoots by less than one sample, so it
        # takes fewer than n samples more than its share from each.
        assert config.blend is not None
        parts = len(config.blend[0])
        super().__init__(dataset, path, documents, num_samples + (parts if parts > 1 else 0), split, config)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["indices"] = None  # documents of the split; needed to build the index, not to read
        state["masks_and_position_ids_are_cached"] = False
        state["cached_loss_mask"] = state["cached_position_ids"] = None
        return state

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        names = ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "description.txt")
        return _through_cache(self, super()._build_document_sample_shuffle_indices, names, self.index_split.name)


class CachedBlendedDataset(_LightPickle, BlendedDataset):
    """A weighted mixture of :class:`CachedGPTDataset`."""

    def _build_indices(self) -> tuple[np.ndarray, ...]:
        names = ("dataset_index.npy", "dataset_sample_index.npy", "description.txt")
        return _through_cache(self, super()._build_indices, names, self.split.name)


class CachedDatasetBuilder(BlendedMegatronDatasetBuilder):
    """megatron.core's builder (rank 0 first, then the others), with the classes of this module."""

    @staticmethod
    def build_generic_dataset(
        kind: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        if kind is BlendedDataset:
            kind = CachedBlendedDataset
        return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, is_built_on_rank, synchronize_ranks, *args)


def _through_cache(dataset: Any, build: Callable[[], Any], names: tuple[str, ...], split: str) -> Any:
    """The result of ``build()``, read from the cache; rank 0 fills that first where it is incomplete or damaged.

    megatron.core lets the other ranks come here when rank 0 is done.
    """
    distributed = torch.distributed.is_initialized()
    folder = Path(dataset.config.path_to_cache)
    # The names that megatron.core gives the files of this dataset.
    base = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split}"
    paths = [folder / f"{base}-{name}" for name in names]
    if distributed and torch.distributed.get_rank() != 0:
        if not all(path.is_file() for path in paths):
            raise DataError(
                f"rank {torch.distributed.get_rank()} does not find the sample index that rank 0 wrote to {folder}; "
                "--data-cache-path must be on a file system that all nodes share"
            )
    elif not is_whole(paths, folder / f"{base}-checksums.json"):
        # megatron.core asks for the rank of a process group where it may save a blend
        if isinstance(dataset, BlendedDataset) and not distributed:
            return _with_cache(dataset, None, build)

        def write(aside: Path) -> list[Path]:
            _with_cache(dataset, str(aside), build)
            return [aside / path.name for path in paths]

        publish(folder, base, write)
    return build()


def _with_cache(dataset: Any, folder: str | None, build: Callable[[], Any]) -> Any:
    """``build()`` with another cache, or none."""
    config = dataset.config
    dataset.config = copy.copy(config)
    dataset.config.path_to_cache = folder
    try:
        return build()
    finally:
        dataset.config = config
