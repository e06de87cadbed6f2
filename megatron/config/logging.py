"""What a run reports, and where."""

import dataclasses

from megatron.config.option import option


@dataclasses.dataclass
class LoggingConfig:
    """Console lines, a JSONL file, TensorBoard and Weights & Biases."""

    log_interval: int = option(10, "Updates between two log lines.", min=1, resumable=True)
    log_file: str | None = option(None, "JSON-lines log (default: SAVE/metrics.jsonl).", metavar="FILE", resumable=True)
    tensorboard_dir: str | None = option(None, "Folder for TensorBoard event files.", metavar="DIR", resumable=True)
    wandb_project: str | None = option(None, "Weights & Biases project (needs the [wandb] extra).", resumable=True)
    run_name: str | None = option(
        None, "Name of the run in logs and plots (default: the preset's or 'gpt').", resumable=True
    )
    profile: str | None = option(
        None, "Profile one update, --profile-step, on the first rank: a table and a trace in this folder.",
        metavar="DIR", resumable=True,
    )  # fmt: skip
    profile_step: int = option(
        10, "The update to profile, counted from the start of this process.", min=1, resumable=True
    )
    peak_tflops: float | None = option(
        None, "Peak dense TFLOP/s of one device for MFU (default: known for common GPUs, else MFU is not shown).",
        above=0, resumable=True,
    )  # fmt: skip
