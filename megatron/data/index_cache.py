"""megatron.core's datasets with a dependable index cache.

What order the samples of a dataset come in is computed once by rank 0 and kept in .npy files that all ranks map into
memory. megatron.core writes those files in place and takes whatever lies there; here they are written aside and
renamed, so a killed run leaves no half-written index, and with checksums, so that a
damaged one is rebuilt. When such a dataset is sent to a
loader process only the names of the files travel.
"""

import copy
import dataclasses
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.data.core_datasets import BlendedDataset, BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig
from megatron.data.errors import DataError
from megatron.data.files import crc32

logger = logging.getLogger(__name__)


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
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        if cls is BlendedDataset:
            cls = CachedBlendedDataset
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


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
        if not all(map(_readable, paths)):
            raise DataError(
                f"rank {torch.distributed.get_rank()} does not find the sample index that rank 0 wrote to {folder}; "
                "--data-cache-path must be on a file system that all nodes share"
            )
    elif not _whole(paths, folder / f"{base}-checksums.json"):
        # megatron.core asks for the rank of a process group where it may save a blend
        if isinstance(dataset, BlendedDataset) and not distributed:
            return _with_cache(dataset, None, build)
        try:
            _fill(dataset, build, folder, base, names)
        except OSError as error:
            raise DataError(
                f"cannot write the sample index to {folder}: {error}. Make room or choose another --data-cache-path"
            ) from error
    return build()


def _fill(dataset: Any, build: Callable[[], Any], folder: Path, base: str, names: Sequence[str]) -> None:
    """Write the files aside, and rename them when all are complete."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{base}.", dir=folder))  # no other run's, on whatever node
    try:
        _with_cache(dataset, str(aside), build)
        made = [aside / f"{base}-{name}" for name in (*names, "checksums.json")]
        made[-1].write_text(json.dumps({path.name: crc32(path) for path in made[:-1]}))
        for path in made:  # the checksums come last: where they are, the rest is
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info("built the sample index %s in %.1f s", folder / base, time.monotonic() - start)


def _with_cache(dataset: Any, folder: str | None, build: Callable[[], Any]) -> Any:
    """``build()`` with another cache, or none."""
    config = dataset.config
    dataset.config = copy.copy(config)
    dataset.config.path_to_cache = folder
    try:
        return build()
    finally:
        dataset.config = config


def _whole(paths: Sequence[Path], checksums: Path) -> bool:
    """Whether all files are there with the content that was written."""
    try:
        expected = json.loads(checksums.read_text())
        return all(_readable(path) and crc32(path) == expected.get(path.name) for path in paths)
    except (OSError, ValueError, AttributeError):
        return False


def _readable(path: Path) -> bool:
    """Whether ``path`` is there and, if an array, has all its bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".npy":
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            return False
    return True
