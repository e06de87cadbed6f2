"""How the last start of a run ended, for scripts: ``SAVE/ended.json``.

Imports nothing heavy: a script asks before it starts anything (tools/run_finished.py).
"""

import contextlib
import json
from pathlib import Path

from megatron.config import RunConfig
from megatron.training.clock import Clock, last_samples

FILE = "ended.json"


def write_exit_record(config: RunConfig, clock: Clock, reason: str) -> None:
    """Write why the run ended in order and how far it had come; nothing without ``--save``. One rank calls it.

    A disk that does not take it is no reason for the run to fail.
    """
    if config.checkpoint.save is None:
        return
    record = {"reason": reason, "step": clock.steps, "samples": clock.samples, "tokens": clock.tokens}
    path = Path(config.checkpoint.save) / FILE
    unfinished = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(record) + "\n")
        unfinished.replace(path)


def finished(config: RunConfig) -> str | None:
    """What there is to say of a run that needs no further start; None if there may be something left to train."""
    if config.checkpoint.save is None:
        return None
    folder = Path(config.checkpoint.save)
    try:
        record = json.loads((folder / FILE).read_text())
        step, samples = record["step"], record["samples"]
        if samples < last_samples(config, samples) or (folder / "latest").read_text().strip() != f"step_{step:08d}":
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"{folder}: finished, {samples * config.model.seq_length} tokens are trained on"
