"""Saving, resuming and stopping."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.option import option, parse_count, rule

if TYPE_CHECKING:
    from megatron.config.run import RunConfig


@dataclasses.dataclass
class CheckpointConfig:
    """Checkpoints are topology-free, atomic and verified on load."""

    save: str | None = option(None, "Folder to save checkpoints in.", metavar="DIR", resumable=True)
    load: str | None = option(
        None, "Folder of a run (its latest checkpoint) or of one checkpoint to resume; empty only if it is --save too.",
        metavar="DIR", resumable=True,
    )  # fmt: skip
    finetune: bool = option(
        False, "Start a new run from the weights of --load: clock, schedule, data and optimizer start over. --save is "
        "another folder; once it holds a checkpoint, the same command resumes the new run.", resumable=True,
    )  # fmt: skip
    finetune_load_optim: bool = option(
        False, "With --finetune, load the optimizer state too (Adam's moments and step count, fp16's loss scale). Off "
        "by default, as in Megatron: old moments fit neither new data nor a schedule that warms up.", resumable=True,
    )  # fmt: skip
    save_interval: int = option(
        1000, "Save every this many updates of the full global batch (counted in tokens); 0 only at the end.", min=0,
        resumable=True,
    )  # fmt: skip
    keep_last: int = option(
        0, "Keep this many newest good checkpoints and delete older ones; 0 keeps all.", min=0, resumable=True
    )
    async_save: bool = option(False, "Write checkpoints in the background while training goes on.", resumable=True)
    exit_duration_in_mins: float | None = option(
        None, "Save and exit this many minutes after the process started.", above=0, resumable=True
    )
    exit_tokens: int | None = option(
        None, "Save and exit at this many consumed tokens; the schedule still ends at --train-tokens.", min=1,
        parse=parse_count, resumable=True,
    )  # fmt: skip


@rule("save", "async_save", "keep_last")
def saving(config: "RunConfig", world_size: int) -> Iterator[str]:
    """Options of saving have an effect."""
    if config.checkpoint.save is not None:
        return
    for flag, given in (("--async-save", config.checkpoint.async_save), ("--keep-last", config.checkpoint.keep_last)):
        if given:
            yield f"{flag} requires a folder to save in, and --save is not given; add --save DIR or drop {flag}"


@rule("finetune", "finetune_load_optim", "load", "save")
def finetune(config: "RunConfig", world_size: int) -> Iterator[str]:
    """``--finetune`` requires weights to start from and a folder of its own, where a restart finds the new run."""
    checkpoint = config.checkpoint
    if not checkpoint.finetune:
        if checkpoint.finetune_load_optim:
            yield (
                "--finetune-load-optim requires --finetune; a resumed run always loads its optimizer state. Add"
                " --finetune, or drop --finetune-load-optim"
            )
    elif checkpoint.load is None:
        yield "--finetune requires --load, the weights to start from; add --load DIR, or drop --finetune"
    elif saves_where_it_loads(config):
        yield (
            f"--finetune starts a new run from the weights of --load {checkpoint.load}, but --save {checkpoint.save} is"
            " the folder of the old run; give another --save, or drop --finetune to resume the old run"
        )


def saves_where_it_loads(config: "RunConfig") -> bool:
    """Whether ``--load`` is the folder of ``--save``, or a checkpoint in it."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None or load is None:
        return False
    return Path(save).resolve() in (Path(load).resolve(), Path(load).resolve().parent)
