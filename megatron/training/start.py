"""What a run makes sure of before it starts: folders it may write to, and the checkpoint that all ranks go on from."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megatron.checkpoint import latest, read_meta
from megatron.config import RunConfig
from megatron.config.checkpoint import saves_where_it_loads
from megatron.config.errors import ConfigError
from megatron.data.files import try_lock
from megatron.engine.optim import OPTIMIZERS
from megatron.parallel.initialize import Topology

_T = TypeVar("_T")


class Checkpoint(NamedTuple):
    """The folder of a checkpoint, and its metadata."""

    path: Path
    meta: dict[str, Any]


def check_outputs(config: RunConfig) -> None:
    """Find out now, and not after hours, what cannot be written; refuse to write among another run's checkpoints.

    Raises:
        ConfigError: naming the flag and what to do.
    """
    logging, save = config.logging, config.checkpoint.save
    if logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb-project needs Weights & Biases; run: pip install -e '.[wandb]', or leave it out")
    log_folder = None if logging.log_file is None else str(Path(logging.log_file).parent)
    for flag, folder in (
        *(("--save", save), ("--log-file", log_folder)),
        *(("--tensorboard-dir", logging.tensorboard_dir), ("--profile", logging.profile)),
    ):
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{flag}: the folder {folder} cannot be made: {error}; choose another one") from None
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{flag}: no permission to write in {folder}; choose another folder")
    found = None if save is None else latest(save)
    if found is not None and not _continues(config):
        raise ConfigError(
            f"--save {save} holds the checkpoints of a run already ({found.name}); "
            f"add --load {save} to continue it, or choose another folder"
        )


def log_folder(config: RunConfig) -> Path | None:
    """Where a run's metrics lie; None if it writes none."""
    if config.logging.log_file is not None:
        return Path(config.logging.log_file).parent
    return None if config.checkpoint.save is None else Path(config.checkpoint.save)


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where the device cannot train in the precision asked for."""
    if config.optimizer.precision == "fp16" and device.type == "cpu":
        raise ConfigError("--fp16 needs a GPU; on a CPU use --fp32 or --bf16")


def check_optimizer(config: RunConfig) -> None:
    """Raises ConfigError where the library of the optimizer asked for is missing."""
    name = config.optimizer.optimizer_name
    library = OPTIMIZERS[name].library
    if library is not None and importlib.util.find_spec(library[0]) is None:
        raise ConfigError(
            f"--optimizer {name} needs {library[0]}; run: pip install -c constraints.txt -e '.[{library[1]}]', or use"
            " --optimizer adamw"
        )


def check_graphs(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError where the device has no CUDA graphs, and they are asked for."""
    if config.training.cuda_graphs and device.type != "cuda":
        raise ConfigError("--cuda-graphs needs a GPU, and torch finds none; drop it")


def _continues(config: RunConfig) -> bool:
    """Whether the same command resumes from what it saves."""
    return config.checkpoint.finetune or saves_where_it_loads(config)


def find_checkpoint(config: RunConfig, topology: Topology) -> Checkpoint | None:
    """The checkpoint to resume from, as the first rank sees it; None to start anew.

    With ``--finetune`` it is one of ``--save``: the run has been started before.

    Raises:
        ConfigError: ``--load`` holds no checkpoint, and it is not the folder where this run saves. Or ``--save`` holds
            those of a run that did not start from the weights of ``--load``.
        CheckpointError: it holds only damaged ones.
    """
    finetune = config.checkpoint.finetune
    folder = config.checkpoint.save if finetune else config.checkpoint.load
    if folder is None:
        return None

    def find() -> Checkpoint | None:
        source = latest(folder)
        if source is not None:
            meta = read_meta(source)
            if finetune:
                _check_same_base(config, source, meta)
            return Checkpoint(source, meta)
        if _continues(config):
            return None
        raise _nothing_in(folder)

    return on_first_rank(find, topology)


def find_base(config: RunConfig, topology: Topology) -> Checkpoint:
    """The checkpoint whose weights ``--finetune`` starts from, as the first rank sees it.

    Raises:
        ConfigError: ``--load`` holds no checkpoint.
        CheckpointError: it holds only damaged ones.
    """

    def find() -> Checkpoint:
        load = str(config.checkpoint.load)
        source = latest(load)
        if source is None:
            raise _nothing_in(load)
        return Checkpoint(source, read_meta(source))

    return on_first_rank(find, topology)


def _nothing_in(load: str) -> ConfigError:
    return ConfigError(f"--load {load}: there is no checkpoint; give the folder of a run, or leave the flag out")


def _check_same_base(config: RunConfig, source: Path, meta: dict[str, Any]) -> None:
    """Raises ConfigError where ``source``, in ``--save``, is of a run that did not start from ``--load``."""
    base, save, load = meta.get("finetuned_from"), config.checkpoint.save, config.checkpoint.load
    if base is None:
        raise ConfigError(
            f"--finetune: --save {save} holds the checkpoints of another run already ({source.name}, which did not "
            "start with --finetune); choose another folder"
        )
    if base["load"] != str(Path(str(load)).resolve()):
        raise ConfigError(
            f"--finetune: --save {save} holds the checkpoints of a run already ({source.name}) that started from "
            f"--load {base['load']}, and this one has --load {load}; give that folder to go on, or another --save to "
            "start a new run"
        )


def how_to_go_on(config: RunConfig) -> str:
    """What the user can do when the run ended before its time."""
    save = config.checkpoint.save
    found = None if save is None else latest(save)
    if found is None:
        return "No checkpoint was completed: the same command starts anew"
    if _continues(config):
        return f"Restart with the same command: it goes on from {found.name}"
    return f"To go on from {found.name}, restart with --load {save}"


def on_first_rank(function: Callable[[], _T], topology: Topology) -> _T:
    """What ``function()`` returns or raises on the first rank, on all ranks."""
    answer: list[Any] = [None, None]
    if topology.is_first:
        try:
            answer[0] = function()
        except (ValueError, OSError, RuntimeError) as error:
            answer[1] = error
    if topology.launch.world_size > 1:
        dist.broadcast_object_list(answer, src=0, group=topology.control_group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextlib.contextmanager
def only_run_in(save: str | None, topology: Topology) -> Iterator[None]:
    """Keep a second run out of the folder ``save`` while this one lasts.

    Raises:
        ConfigError: another one is writing there.
    """
    held: list[int] = []

    def lock() -> None:
        if save is None:
            return
        held.append(os.open(Path(save) / ".lock", os.O_RDWR | os.O_CREAT, 0o644))
        if try_lock(held[0]) is False:
            raise ConfigError(f"--save {save}: another run is writing there; wait for it or choose another folder")

    on_first_rank(lock, topology)
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
