"""What going back from a spike of the loss needs of the rest of a configuration, and spans of data to leave out."""

from collections.abc import Iterator

from megatron.config.run import RunConfig
from megatron.config.spans import parse_span


def spike_problems(config: RunConfig) -> Iterator[str]:
    """There must be an earlier checkpoint to go back to."""
    checkpoint = config.checkpoint
    if config.guard.spike_sigmas is None:
        return
    if checkpoint.save is None or checkpoint.save_interval == 0:
        yield "--spike-sigmas must have checkpoints to go back to; add --save DIR, with --save-interval above 0"
    if checkpoint.keep_last == 1:
        yield "--spike-sigmas must have a checkpoint from before the spike, and --keep-last 1 keeps none; use 2 or more"


def skip_problems(config: RunConfig) -> Iterator[str]:
    """The spans of ``--skip-samples`` must be spans."""
    for word in config.data.skip_samples:
        try:
            parse_span(word)
        except ValueError as error:
            yield f"--skip-samples: {error}"
