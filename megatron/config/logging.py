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
    peak_tflops: float | None = option(
        None, "Peak dense TFLOP/s of one device for MFU (default: known for common GPUs, else MFU is not shown)."
    )
