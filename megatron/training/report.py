"""Where the figures of a run go: the console, a JSON-lines file, TensorBoard, Weights & Biases."""

import contextlib
import functools
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from megatron.config import LoggingConfig

_LOGGED = ("train", "valid", "test")  # kinds of records that TensorBoard and Weights & Biases draw


class LogWriter(Protocol):
    """Takes one record at a time."""

    def write(self, record: dict[str, Any]) -> None:
        """Write a record of kind run, train, valid, test, save, not_saved, spike, warning, stop, or a user's own."""

    def close(self) -> None:
        """Flush and close."""


def human(count: float) -> str:
    """``2400000`` as ``2.4M``."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g}{letter}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """Seconds as ``2d03h``, ``1h05m``, ``4m10s`` or ``9s``."""
    seconds = int(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def _progress(record: dict[str, Any]) -> str:
    return f"step {record['step']:>6} | {human(record['tokens'])}/{human(record['train_tokens'])} tokens"


def _line_of_other(record: dict[str, Any]) -> str:
    """The line of a record of a kind that :class:`Console` does not know."""
    known = ("kind", "step", "tokens", "train_tokens")
    values = ", ".join(f"{name} {value}" for name, value in record.items() if name not in known)
    return f"{_progress(record)} | {record['kind']}: {values}"


class Console:
    """One line a record for people."""

    def write(self, record: dict[str, Any]) -> None:
        """Print the record's line at once."""
        line = getattr(self, f"_line_{record['kind']}", _line_of_other)(record)
        print(line, flush=True)

    def close(self) -> None:
        """Nothing is held back."""
        sys.stdout.flush()

    def _line_run(self, record: dict[str, Any]) -> str:
        start = "starting" if record["resumed_at_tokens"] is None else f"resuming at {human(record['tokens'])} tokens"
        if record.get("started_from"):
            start = f"starting from the weights of {record['started_from']}"
        degrees = ", ".join(map(str, record["expert_parallel"]))
        return (
            f"{record['name']}: {human(record['parameters'])} parameters, "
            f"{human(record['active_parameters'])} active a token; "
            f"{record['world_size']} process(es) on {record['device']}, tensor parallel {record['tensor_parallel']}, "
            f"pipeline parallel {record['pipeline_parallel']}, expert parallel {degrees}, "
            f"{record['precision']}; {start}"
        )

    def _line_train(self, record: dict[str, Any]) -> str:
        parts = [_progress(record)]
        if record["loss"] is None:
            parts.append("loss not finite")
        else:
            parts.append(f"loss {record['loss']:.4f}")
            if "experts" in record:
                parts.append(f"aux {record['aux_loss']:.3f}")
        parts.append(f"grad {record['grad_norm']:.3f} | lr {record['lr']:.2e}")
        parts.append(f"{human(record['tokens_per_second'])} tok/s | {record['tflops_per_device']:.3g} TFLOP/s")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"{record['memory_gb']:.1f} GB")
        if "experts" in record:
            load, dropped, dead = (record["experts"][key] for key in ("load", "dropped", "dead"))
            chance = max(record["experts"].get("dropped_by_chance", [0.0]))
            by_chance = f" (chance {chance:.1%})" if chance else ""
            parts.append(f"experts max/mean {max(load):.2f} drop {max(dropped):.1%}{by_chance} dead {sum(dead)}")
        if "monitors" in record:
            router = record["monitors"].get("max_router_logit")
            logits = f"max logits: attention {max(record['monitors']['max_attention_logit']):.3g}"
            parts.append(logits + (f" router {max(router):.3g}" if router else ""))
        if record["skipped"]:
            parts.append(f"skipped {record['skipped']}")
        parts.append(f"eta {duration(record['eta_seconds'])}")
        return " | ".join(parts)

    def _line_valid(self, record: dict[str, Any], what: str = "validation loss") -> str:
        of = f" of {record['set']}" if "set" in record else ""
        return f"{_progress(record)} | {what}{of} {record['loss']:.4f} | perplexity {record['perplexity']:.2f}"

    def _line_test(self, record: dict[str, Any]) -> str:
        return self._line_valid(record, "test loss")

    def _line_save(self, record: dict[str, Any]) -> str:
        what = f"saved {record['folder']} in {record['seconds']:.1f} s"
        if record["background"]:
            what = f"saving {record['folder']}"
        if record.get("standing") == "doubted":
            what += ", in doubt: the last loss is far above the usual; latest does not name it"
        return f"{_progress(record)} | {what}"

    def _line_not_saved(self, record: dict[str, Any]) -> str:
        return f"{_progress(record)} | NOT SAVED: {record['reason']}"

    def _line_spike(self, record: dict[str, Any]) -> str:
        return f"{_progress(record)} | SPIKE: {record['reason']}"

    def _line_warning(self, record: dict[str, Any]) -> str:
        return f"{_progress(record)} | WARNING: {record['reason']}"

    def _line_stop(self, record: dict[str, Any]) -> str:
        return f"{_progress(record)} | stopped: {record['reason']}"


class JsonLines:
    """One JSON object a line; plots and tools read it. What a full disk does not take is written when it does."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._unwritten = b""
        if self._file.tell() and self._last_byte() != b"\n":
            self._unwritten = b"\n"  # a killed run left half a line; what follows must not be lost with it

    def _last_byte(self) -> bytes:
        self._file.seek(-1, 2)
        return self._file.read(1)

    def write(self, record: dict[str, Any]) -> None:
        """Append the record. Numbers that are not finite become null: they are no JSON."""
        self._unwritten += json.dumps(_finite(record)).encode() + b"\n"
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _curve(record: dict[str, Any]) -> str:
    """What the numbers of a record are filed under: its kind, and its set if that has a name."""
    return f"{record['kind']}/{record['set']}" if "set" in record else record["kind"]


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record of losses: ``train/loss``, ``train/experts/load/moe0``, ``valid/SET/loss`` and so on.

    The elements of lists are filed under ``moeN``, for MoE layers, except for those of all layers, under ``layerN``.
    """
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, int | float):
            flat[prefix] = float(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)
        elif isinstance(value, list):
            element = "layer" if prefix.endswith("/max_attention_logit") else "moe"
            for number, item in enumerate(value):
                walk(f"{prefix}/{element}{number}", item)

    if record["kind"] in _LOGGED:
        walk(_curve(record), {k: v for k, v in record.items() if k not in ("kind", "set", "tokens", "train_tokens")})
    return flat


def went_back_to(record: dict[str, Any]) -> int | None:
    """The consumed tokens up to which what was logged before still holds, if a record says so; else None."""
    if record["kind"] == "run":
        return record["resumed_at_tokens"] or 0
    return record["resumed_at_tokens"] if record["kind"] == "spike" else None


class TensorBoard:
    """Scalars over consumed tokens. Of what a resumed run trains on anew, TensorBoard shows the new figures alone."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = functools.partial(SummaryWriter, folder)
        self._writer: SummaryWriter | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Add the record's numbers at its tokens."""
        tokens = went_back_to(record)
        if tokens is not None:
            self.close()
            self._writer = self._open(purge_step=tokens + 1)
        values = scalars(record)
        if values and self._writer is None:
            self._writer = self._open()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, record["tokens"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Scalars over consumed tokens, on Weights & Biases.

    ``SAVE/wandb.json`` keeps the id, so that all starts of a run are one run there, and how far it has been logged: a
    point that is there cannot be taken back, so no other is added for the same tokens.
    """

    def __init__(self, project: str, name: str, save: str | None) -> None:
        wandb = importlib.import_module("wandb")  # an optional package; megatron.training.start checks for it
        self._file = None if save is None else Path(save) / "wandb.json"
        kept = self._kept(project)
        self._run = wandb.init(project=project, name=name, id=kept.get("id"), resume="allow")
        for kind in _LOGGED:
            self._run.define_metric(f"{kind}/*", step_metric="tokens")
        self._logged: dict[str, int] = kept.get("logged", {})  # kind or kind/set -> tokens of its newest point
        self._there = dict(self._logged)  # the same, when the run last started or went back
        self._record = {"project": project, "id": self._run.id, "logged": self._logged}

    def _kept(self, project: str) -> dict[str, Any]:
        try:
            kept = json.loads(self._file.read_text()) if self._file is not None else {}
        except (OSError, ValueError):
            return {}
        return kept if kept.get("project") == project else {}

    def _keep(self) -> None:
        if self._file is not None:
            unfinished = self._file.with_suffix(".tmp")
            unfinished.write_text(json.dumps(self._record) + "\n")
            unfinished.replace(self._file)

    def write(self, record: dict[str, Any]) -> None:
        """Log the record's numbers; a run record becomes the run's configuration."""
        kind, tokens = record["kind"], record["tokens"]
        back = went_back_to(record)
        if back is not None:
            self._there = dict(self._logged)
            if (most := max(self._there.values(), default=0)) > back:
                print(
                    f"Weights & Biases keeps what it has of this run, up to {most} tokens; the run goes on at {back} "
                    "tokens, and what comes after those is added",
                    flush=True,
                )
        if kind == "run":
            self._run.config.update(record["config"], allow_val_change=True)
            self._keep()
        values = scalars(record)
        if values and tokens > self._there.get(_curve(record), -1):
            self._run.log(values | {"tokens": tokens})
            self._logged[_curve(record)] = tokens
            self._keep()

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Report:
    """Sends records to all writers of a run, from the first rank only, and knows how long the run will still take."""

    def __init__(self, config: LoggingConfig, name: str, save: str | None, is_first: bool) -> None:
        self._writers: list[LogWriter] = []
        self._failing: set[LogWriter] = set()
        self._started: tuple[float, int] | None = None
        if not is_first:
            return
        self._writers.append(Console())
        if config.log_file or save:
            self._writers.append(JsonLines(Path(config.log_file or Path(save or ".") / "metrics.jsonl")))
        if config.tensorboard_dir:
            self._writers.append(TensorBoard(config.tensorboard_dir))
        if config.wandb_project:
            self._writers.append(WeightsAndBiases(config.wandb_project, name, save))

    def write(self, kind: str, *, step: int, tokens: int, train_tokens: int, **values: Any) -> None:
        """Write one record of ``kind`` at ``tokens`` consumed tokens of ``train_tokens``."""
        record = {"kind": kind, "step": step, "tokens": tokens, "train_tokens": train_tokens, **values}
        if kind == "run":
            self._started = (time.perf_counter(), tokens)
        if kind == "train" and self._started:
            since, first = self._started
            record["eta_seconds"] = (time.perf_counter() - since) / max(tokens - first, 1) * (train_tokens - tokens)
        for writer in self._writers:
            try:
                writer.write(record)
                self._failing.discard(writer)
            except OSError as error:  # a full disk, a closed terminal: no reason to lose the run
                self._complain(writer, error)

    def _complain(self, writer: LogWriter, error: OSError) -> None:
        if writer not in self._failing:
            self._failing.add(writer)
            with contextlib.suppress(OSError):
                print(f"warning: {type(writer).__name__} cannot log: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close every writer."""
        for writer in self._writers:
            try:
                writer.close()
            except OSError as error:
                self._complain(writer, error)
