"""What a run reports, and where."""

import dataclasses

from megatron.config.fields import option


@dataclasses.dataclass
class LoggingConfig:
    """Console lines, a JSONL file, TensorBoard and Weights & Biases."""

    log_interval: int = option(10, "Updates between two log lines.")
    log_file: str | None = option(None, "JSON-lines log (default: SAVE/metrics.jsonl).", metavar="FILE")
    tensorboard_dir: str | None = option(None, "Folder for TensorBoard event files.", metavar="DIR")
    wandb_project: str | None = option(None, "Weights & Biases project (needs the [wandb] extra).")
    run_name: str | None = option(None, "Name of the run in logs and plots (default: the preset's or 'gpt').")
    profile: str | None = option(
        None,
        "Profile one update, --profile-step, on the first rank: a table and a trace in this folder.",
        metavar="DIR",
    )
    profile_step: int = option(10, "The update to profile, counted from the start of this process.")
    peak_tflops: float | None = option(
        None, "Peak dense TFLOP/s of one device for MFU (default: known for common GPUs, else MFU is not shown)."
    )
