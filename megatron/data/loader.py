"""From a dataset to the micro-batches of a rank.

S sequence, B micro-batch.
"""

import atexit
import functools
import signal
import weakref
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from megatron.config import DataConfig, RunConfig
from megatron.data.documents import with_documents
from megatron.data.processes import end_with_parent
from megatron.data.sampler import MicroBatchSampler

SAMPLE_FIELDS = ("tokens", "labels", "loss_mask")
"""Tensors of a sample, and of a micro-batch; see also :data:`megatron.data.documents.DOCUMENT_FIELDS`."""

# What schedulers and terminals send to every process of a job to ask it to save and stop.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Samples(Protocol):
    """A dataset of known length whose items have the ``SAMPLE_FIELDS``, each a tensor [S]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


def batches(
    dataset: Samples,
    config: RunConfig,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    eod: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The micro-batches of this rank, from ``consumed_samples`` to the end of ``dataset``.

    Loads ahead in ``--num-workers`` processes, into pinned memory where the run is on a GPU. They end with the iterator
    and with this process. They are not forked from it, so CUDA and threads in it do them no harm; the main module must
    be importable (``if __name__ == "__main__"``).

    Args:
        dataset: as :func:`megatron.data.gpt_dataset.build_datasets` makes them.
        config: of the run.
        dp_rank: this data-parallel rank.
        dp_size: data-parallel ranks.
        consumed_samples: samples of all ranks that are done.
        eod: the tokenizer's end-of-document token, for options that tell documents apart.

    Returns:
        An iterator of ``tokens`` [B, S], ``labels`` [B, S], ``loss_mask`` [B, S] and ``sample_index``, the number in
        the run of the first sample (int); and of what :func:`megatron.data.documents.with_documents` adds.
    """
    workers = config.data.num_workers
    loader = DataLoader(
        _MicroBatches(dataset, config.data, eod),
        batch_sampler=MicroBatchSampler(
            len(dataset), config.training.micro_batch_size, dp_rank, dp_size, consumed_samples
        ),
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context=_server() if workers else None,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=torch.cuda.is_available() and config.training.device != "cpu",
        generator=torch.Generator(),  # so that starting to load draws nothing from the run's own randomness
    )
    return _ClosedAtExit(iter(loader)) if workers else iter(loader)


class _ClosedAtExit:
    """An iterator of a DataLoader that dismisses its processes before the interpreter waits for them to end.

    Without this, whoever still holds the iterator at the end of the program would wait for ever: what Python sends
    to end them is the SIGTERM that :func:`_start_worker` ignores.
    """

    def __init__(self, iterator: Iterator[dict[str, Any]]) -> None:
        self._iterator: Iterator[dict[str, Any]] | None = iterator
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        """End the loader processes."""
        self._iterator = None  # the DataLoader ends them when its iterator goes
        atexit.unregister(self._at_exit)

    def __del__(self) -> None:
        self.close()


def _close(iterator: "weakref.ref[_ClosedAtExit]") -> None:
    if (alive := iterator()) is not None:
        alive.close()


class _MicroBatches(Dataset[dict[str, Any]]):
    """Makes one micro-batch of many samples in one call."""

    def __init__(self, dataset: Samples, data: DataConfig, eod: int | None) -> None:
        self._dataset, self._data, self._eod = dataset, data, eod

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        items = [self._dataset[index] for index in indices]
        batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in SAMPLE_FIELDS}
        batch["sample_index"] = indices[0]
        return with_documents(batch, self._data, self._eod)


def _unchanged(batch: Any) -> Any:
    return batch  # which __getitems__ has made


def _server() -> BaseContext:
    """The process that forks loader processes, and Python's resource tracker, started where they are not yet.

    The stop signals are blocked in both (the tracker, which takes only some, ignores those).
    The trainer finishes its update and saves when the whole job is told to stop, and needs its data until then.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron.data.gpt_dataset"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # again, because that changes the mask
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _start_worker(worker: int) -> None:
    """End with the rank, and ignore the stop signals.

    Of SIGTERM only the first: by the second, a process that is stuck is ended.
    """

    def first_term(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in _STOP_SIGNALS:
        signal.signal(number, first_term if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    end_with_parent()
