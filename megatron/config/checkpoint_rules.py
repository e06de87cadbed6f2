"""What saving, resuming and starting from the weights of another run require of the rest of a configuration."""

from collections.abc import Iterator
from pathlib import Path

from megatron.config.run import RunConfig


def save_problems(config: RunConfig) -> Iterator[str]:
    """Options of saving that would have no effect."""
    if config.checkpoint.save is not None:
        return
    for flag, given in (("--async-save", config.checkpoint.async_save), ("--keep-last", config.checkpoint.keep_last)):
        if given:
            yield f"{flag} must have a folder to save in, and --save is not given; add --save DIR or drop {flag}"


def finetune_problems(config: RunConfig) -> Iterator[str]:
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


def change_blend_problems(config: RunConfig) -> Iterator[str]:
    """``--change-blend`` would have no effect where nothing is resumed."""
    if config.data.change_blend and config.checkpoint.load is None:
        yield "--change-blend requires --load, the run to resume; add --load DIR, or drop --change-blend"


def saves_where_it_loads(config: RunConfig) -> bool:
    """Whether ``--load`` is the folder of ``--save``, or a checkpoint in it."""
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None or load is None:
        return False
    return Path(save).resolve() in (Path(load).resolve(), Path(load).resolve().parent)
