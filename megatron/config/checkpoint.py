"""Saving, resuming and stopping."""

import dataclasses

from megatron.config.fields import option, parse_count


@dataclasses.dataclass
class CheckpointConfig:
    """Checkpoints are topology-free, atomic and verified on load."""

    save: str | None = option(None, "Folder to save checkpoints in.", metavar="DIR")
    load: str | None = option(
        None, "Folder of a run (its latest checkpoint) or of one checkpoint to resume; empty only if it is --save too.",
        metavar="DIR",
    )  # fmt: skip
    finetune: bool = option(
        False, "Start a new run from the weights of --load: clock, schedule, data and optimizer start over. --save is "
        "another folder; once it holds a checkpoint, the same command resumes the new run.",
    )  # fmt: skip
    finetune_load_optim: bool = option(
        False, "With --finetune, load the optimizer state too (Adam's moments and step count, fp16's loss scale). Off "
        "by default, as in Megatron: old moments fit neither new data nor a schedule that warms up.",
    )  # fmt: skip
    save_interval: int = option(
        1000, "Save every this many updates of the full global batch (counted in tokens); 0 only at the end."
    )
    keep_last: int = option(0, "Keep this many newest good checkpoints and delete older ones; 0 keeps all.")
    async_save: bool = option(False, "Write checkpoints in the background while training goes on.")
    exit_duration_in_mins: float | None = option(None, "Save and exit this many minutes after the process started.")
    exit_tokens: int | None = option(
        None, "Save and exit at this many consumed tokens; the schedule still ends at --train-tokens.",
        parse=parse_count,
    )  # fmt: skip
