"""What can be wrong with a node, done to one process; trainer_server.py calls these by name."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def hides(name: str) -> None:
    """Files of this name are not there."""
    whole = Path.is_file
    Path.is_file = lambda self, **options: self.name != name and whole(self, **options)


def truncated(name: str) -> None:
    """Files of this name seem to be one byte shorter."""
    whole = os.path.getsize
    os.path.getsize = lambda path: whole(path) - str(path).endswith(name)


def other_data() -> None:
    """Another dataset of this name is there."""
    from megatron.preflight import facts

    whole = facts.read_data
    facts.read_data = lambda config: ({file: size + 2 for file, size in whole(config)[0].items()}, [])


def other_version(package: str) -> None:
    """Another version of a package is installed."""
    import importlib.metadata

    whole = importlib.metadata.version
    importlib.metadata.version = lambda asked: "0.0.1" if asked == package else whole(asked)


def clock_ahead(seconds: str) -> None:
    """The clock is wrong."""
    whole = time.time
    time.time = lambda: whole() + float(seconds)


def slow_links(seconds: str) -> None:
    """A large all-reduce and an all-to-all take longer."""
    import torch.distributed as dist

    _delay(dist, "all_reduce", float(seconds))
    _delay(dist, "all_to_all_single", float(seconds))


def slow_device(seconds: str) -> None:
    """Matrix products written into a given tensor take longer."""
    _delay(torch, "matmul", float(seconds))


def wrong_products() -> None:
    """Matrix products are wrong."""
    whole = torch.matmul
    torch.matmul = lambda left, right, out: whole(left, right, out=out).add_(1)


def hangs_in_products() -> None:
    """The device never answers."""
    from megatron.preflight import check

    check.measure_products = lambda device: time.sleep(1000)
    check.LIMIT = 2.0


def full_disk() -> None:
    """Next to no space is left."""
    import shutil

    from megatron.preflight import facts

    whole = shutil.disk_usage
    facts.shutil.disk_usage = lambda path: whole(path)._replace(free=1000)


def own_disk() -> None:
    """Checkpoints of others are not seen."""
    whole = Path.exists
    Path.exists = lambda self, **options: not self.name.startswith(".preflight-") and whole(self, **options)


def poisoned_samples(first: str, end: str) -> None:
    """Some of the training data is noise."""
    _wrap_training_data(lambda source: Poisoned(source, int(first), int(end), noise))


def samples_not_finite(first: str, end: str) -> None:
    """Some of the training data has a loss that is not finite."""
    _wrap_training_data(lambda source: Poisoned(source, int(first), int(end), nan))


def noted_sequences() -> None:
    """What is trained on is printed."""
    _wrap_training_data(Noted)


def noise(item: dict, index: int) -> dict:
    """The item with other words."""
    generator = torch.Generator().manual_seed(index)
    words = torch.randint(120, (len(item["tokens"]) + 1,), generator=generator)
    return item | {"tokens": words[:-1], "labels": words[1:]}


def nan(item: dict, index: int) -> dict:
    """The item with a loss of NaN."""
    return item | {"loss_mask": torch.full_like(item["loss_mask"], torch.nan)}


def _wrap_training_data(wrap: Callable) -> None:
    from megatron.training import pretrain

    whole = pretrain.build_datasets

    def build(*args):
        found = whole(*args)
        return dataclasses.replace(found, train=wrap(found.train))

    pretrain.build_datasets = build


class Noted:
    """A dataset that prints a digest of each of its samples that is read."""

    def __init__(self, source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        item = self._source[index]
        print("sequence", hashlib.sha256(item["tokens"].numpy()).hexdigest(), flush=True)
        return item

    def extended(self, length: int) -> "Noted":
        return Noted(self._source.extended(length))


class Poisoned:
    """A dataset with poison in samples ``first`` to ``end``; loader processes have it too."""

    def __init__(self, source, first: int, end: int, poison: Callable[[dict, int], dict]) -> None:
        self._source, self._first, self._end, self._poison = source, first, end, poison

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        item = self._source[index]
        if self._first <= index < self._end:
            item = self._poison(item, index)
        return item

    def extended(self, length: int) -> "Poisoned":
        return Poisoned(self._source.extended(length), self._first, self._end, self._poison)


def _delay(module: object, name: str, seconds: float) -> None:
    whole = getattr(module, name)

    def slower(*args, **options):
        time.sleep(seconds)
        return whole(*args, **options)

    setattr(module, name, slower)
