"""Draw the loss curves of runs over the tokens that they were trained on, and print their results as a table.

    python tools/plot_runs.py RUN [RUN ...] --output loss_curves.png loss_curves.svg --table

A RUN is a ``metrics.jsonl``, or the folder that holds one (the run's ``--save``), or TensorBoard's event files that a
run wrote (``--tensorboard-dir``). Training loss is the thin line, smoothed; validation loss the bold one with marks,
with dashes for the second validation set and those after it. What a run logged beyond the point that it was later
resumed from, or went back to for a spike, is left out.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5c5c5c")
DASHES = ("-", "--", ":", "-.")  # of the validation sets of a run
_KINDS = {"valid": "validation loss", "test": "test loss"}
_EVENTS = "events.out.tfevents."  # how names of event files begin
SMOOTHED_SHARE = 0.02  # each point of the training curve averages this share of the run
HIDDEN_SHARE = 0.03  # the first fall of the loss, up to this share of the run, does not set the height of the picture


EPILOG = """\
examples:
  Validation loss over tokens, dense models against models with experts, as in the publication's first figure:
    python tools/plot_runs.py checkpoints/350M_dense checkpoints/350M_MoE128 checkpoints/1.3B_dense \\
        --validation-only --output figure1.png figure1.svg
  Under other names, and the numbers as a table; each run is compared with the first:
    python tools/plot_runs.py dense=runs/a/metrics.jsonl "128 experts=runs/b" --table --output curves.pdf
  From TensorBoard's files, while the run goes on:
    python tools/plot_runs.py tensorboard/350M_MoE128 --output now.png

Runs are comparable where tokenizer and validation data are the same. The log of a killed run may end in half a line,
which is named, and left out.
"""


class RunError(ValueError):
    """A run that cannot be read or drawn."""


@dataclasses.dataclass
class Run:
    """What one run logged, without superseded lines; tokens rise strictly in each list of them.

    Validation and test sets are by name; the one that has none, of --split or a blend, is "".
    """

    name: str
    header: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    valid: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    test: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    resumed_at: list[int] = dataclasses.field(default_factory=list)

    def forget_after(self, tokens: int) -> None:
        """Drop what was logged beyond ``tokens`` consumed tokens."""
        self.train = [line for line in self.train if line["tokens"] <= tokens]
        for sets in (self.valid, self.test):
            for name, lines in sets.items():
                sets[name] = [line for line in lines if line["tokens"] <= tokens]
        self.resumed_at = [resumed for resumed in self.resumed_at if resumed < tokens]

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of the log. A loss of None (every update was skipped) becomes NaN."""
        for name in (
            "tokens",
            "resumed_at_tokens",
            "step",
            "loss",
            "tokens_per_second",
            "parameters",
            "active_parameters",
        ):
            value = line.get(name)
            if value is not None and not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}, no number")
        if line["kind"] == "run":
            resumed = line.get("resumed_at_tokens") or 0
            self.forget_after(resumed)
            self.header = line
            self.name = line.get("name") or self.name
            if resumed:
                self.resumed_at.append(resumed)
        elif line["kind"] == "spike" and line.get("resumed_at_tokens") is not None:
            self.forget_after(line["resumed_at_tokens"])
            self.resumed_at.append(line["resumed_at_tokens"])
        elif line["kind"] in ("train", "valid", "test"):
            tokens, loss, name = line["tokens"], line["loss"], line.get("set", "")
            if tokens is None or not 0 <= tokens < math.inf:
                raise ValueError(f"tokens is {tokens}, no count")
            if not isinstance(name, str):
                raise TypeError(f"set is {name!r}, no name")
            lines = self.lines(line["kind"], name)
            while lines and lines[-1]["tokens"] >= tokens:
                lines.pop()
            lines.append(line | {"loss": math.nan if loss is None else loss})

    def lines(self, kind: str, name: str = "") -> list[dict[str, Any]]:
        """The lines of training, or of a set, to read or to append to."""
        return self.train if kind == "train" else getattr(self, kind).setdefault(name, [])

    def all_lines(self) -> list[dict[str, Any]]:
        """Those that can be drawn."""
        return [*self.train, *(line for lines in self.valid.values() for line in lines)]

    @property
    def tokens(self) -> int:
        """Tokens consumed at the last line."""
        return max((line["tokens"] for line in self.all_lines()), default=0)

    def last_loss(self, kind: str, name: str = "") -> float | None:
        """The last loss of a set, in nats a token."""
        lines = getattr(self, kind).get(name)
        return lines[-1]["loss"] if lines else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the training lines."""
        rates = [line["tokens_per_second"] for line in self.train if line.get("tokens_per_second")]
        return statistics.median(rates) if rates else None


def read_run(given: str | Path) -> Run:
    """Read a RUN of the command line.

    Raises:
        RunError: there is no log, or nothing in it can be drawn.
    """
    name, _, rest = str(given).rpartition("=")
    path = Path(rest) if name and not Path(given).exists() else Path(given)
    file = path / "metrics.jsonl" if path.is_dir() else path
    events = sorted(path.glob(f"{_EVENTS}*")) if path.is_dir() else [path] if path.name.startswith(_EVENTS) else []
    if not path.exists():
        raise RunError(f"{path}: there is no such file or folder; give a metrics.jsonl or the --save folder of a run")
    if not file.is_file() and not events:
        raise RunError(
            f"{path}: there is no metrics.jsonl in this folder, and there are no event files of TensorBoard; give the "
            "--save or --tensorboard-dir folder of a run"
        )
    try:
        run = _read_events(path, events) if events and not (path / "metrics.jsonl").is_file() else _read_lines(file)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    if not run.all_lines():
        raise RunError(f"{path}: no training or validation line to draw; has the run logged anything yet?")
    if path != Path(given):
        run.name = name
    return run


def _read_lines(file: Path) -> Run:
    """A run from its metrics.jsonl."""
    run = Run(name=(file.parent.name if file.name == "metrics.jsonl" else file.stem))
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            run.add(json.loads(text))
        except json.JSONDecodeError:  # a run that was killed leaves half a line
            print(f"{file}:{number}: left out, not JSON: {text[:60]}", file=sys.stderr)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f'{file}:{number}: expected {{"kind": "run", "train" or "valid", "tokens": ..., "loss": ...}}, '
                f"got {text[:80]} ({type(error).__name__}: {error})"
            ) from error
    return run


def _read_events(path: Path, files: Sequence[Path]) -> Run:
    """A run from TensorBoard's event files, the oldest first; their steps are tokens."""
    run = Run(name=path.name if path.is_dir() else path.parent.name)
    for file in files:
        for event in _events(file):
            if event.session_log.status == event.session_log.START:  # so TensorBoard is told to forget what follows
                run.forget_after(event.step - 1)
            for value in event.summary.value:
                kind, _, rest = value.tag.partition("/")
                name, _, key = rest.rpartition("/")
                if kind not in ("train", "valid", "test") or key not in ("loss", "step", "tokens_per_second"):
                    continue
                lines = run.lines(kind, name)
                if lines and lines[-1]["tokens"] == event.step:
                    lines[-1][key] = value.simple_value
                    continue
                if kind == "train" and lines and lines[-1]["tokens"] > event.step:
                    run.forget_after(event.step - 1)  # the run was resumed before this
                line = {"kind": kind, "set": name, "tokens": event.step, "loss": None, "step": None}
                run.add(line | {key: value.simple_value})
    return run


def _events(file: Path) -> Iterator[Any]:
    """The events of a file of TensorBoard's, as far as it can be read."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    events: Any = event_pb2  # its classes are made when it is imported
    reader, seen = PyRecordReader_New(str(file)), 0
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            return
        except DataLossError as error:
            print(f"{file}: the rest is left out from event {seen} on: {error}", file=sys.stderr)
            return
        seen += 1
        yield events.Event.FromString(reader.record())


def _unit(number: float) -> tuple[float, str]:
    """The unit that a count is read in, and its letter."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return limit, letter
    return 1.0, ""


def count(number: float | None) -> str:
    """A count for people, in three digits: 2.40M, 52.0B; a dash for None."""
    if number is None:
        return "-"
    unit, letter = _unit(number)
    digits = max(0, 2 - int(math.log10(number / unit))) if letter else 0
    return f"{number / unit:.{digits}f}{letter}"


def table(runs: Sequence[Run]) -> str:
    """One row a run, then sentences for each run after the first that compare the validation losses."""
    sets = [("valid", name) for name in set_names(runs, "valid") or [""]]
    sets += [("test", name) for name in set_names(runs, "test")]
    titles = [f"{_KINDS[kind]}{name and f' of {name}'}" for kind, name in sets]
    rows: list[tuple[str, ...]] = [("run", "parameters", "active", "tokens", *titles, "tokens/s")]
    for run in runs:
        losses, rate = [run.last_loss(*of) for of in sets], run.tokens_per_second
        rows.append(
            (
                run.name,
                count(run.header.get("parameters")),
                count(run.header.get("active_parameters")),
                count(run.tokens),
                *("-" if loss is None else f"{loss:.4f}" for loss in losses),
                "-" if rate is None else f"{rate:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])))
    lines = []
    for name, *cells in rows:
        padded = [name.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    names = set_names(runs, "valid") or [""]
    return "\n".join(lines + [comparison(runs[0], run, name) for run in runs[1:] for name in names])


def set_names(runs: Sequence[Run], kind: str) -> list[str]:
    """The sets of any of the runs, in their order."""
    return list(dict.fromkeys(name for run in runs for name, lines in getattr(run, kind).items() if lines))


def comparison(first: Run, other: Run, name: str = "") -> str:
    """A sentence that says which of two runs has the lower loss on a validation set, and by how much."""
    before, after = first.last_loss("valid", name), other.last_loss("valid", name)
    on = f" on {name}" if name else ""
    if before is None or after is None:
        return f"{other.name} and {first.name} cannot be compared{on}: one of them has no validation yet."
    difference = after - before
    if not math.isfinite(difference):
        return f"{other.name} and {first.name} cannot be compared{on}: a validation loss is not finite."
    verdict = f"{abs(difference):.4f} {'lower' if difference < 0 else 'higher'} than" if difference else "the same as"
    then, now = first.valid[name][-1]["tokens"], other.valid[name][-1]["tokens"]
    clock = f"the same {count(now)} tokens" if now == then else f"{count(now)} tokens against {count(then)}"
    return f"The validation loss of {other.name}{on} is {verdict} that of {first.name}, after {clock}."


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over ``window`` points, fewer at the ends; non-finite values are left out."""
    if not values:
        return []
    half = window // 2
    given = np.asarray(values, dtype=float)
    finite = np.isfinite(given)
    near, weights = slice(half, half + len(given)), np.ones(2 * half + 1)
    sums = np.convolve(np.where(finite, given, 0.0), weights)[near]
    counts = np.convolve(finite.astype(float), weights)[near]
    return [float(total / number) if number else math.nan for total, number in zip(sums, counts, strict=True)]


def draw(
    runs: Sequence[Run],
    outputs: Sequence[Path],
    title: str | None = None,
    x: str = "tokens",
    validation_only: bool = False,
) -> None:
    """Write the picture to each of ``outputs``; PNG, SVG or PDF by its name.

    Raises:
        RunError: matplotlib is missing, or it knows no format of a name, or lines lack ``x``, or a picture cannot be
            written.
    """
    try:
        import matplotlib
    except ImportError:
        raise RunError('drawing needs matplotlib, the [plot] extra: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    key = {"tokens": "tokens", "steps": "step"}[x]
    for run in runs:
        if any(line.get(key) is None for line in run.all_lines()):
            raise RunError(f"{run.name}: got --x {x}, and lines of its log have no '{key}'; give --x tokens")
    style: dict[Any, Any] = {
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "plot_runs",
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        for output in outputs:
            if output.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
                raise RunError(f"got --output {output}; expected a name that ends in .png, .svg or .pdf")
        visible: list[float] = []
        for index, run in enumerate(runs):
            color = COLORS[index % len(COLORS)]
            train = [] if validation_only else run.train
            window = max(1, round(SMOOTHED_SHARE * len(train)))
            losses = smooth([line["loss"] for line in train], window)
            places = [line[key] for line in train]
            axes.plot(places, losses, color=color, linewidth=1, alpha=0.55)
            for resumed in run.resumed_at:
                before = [i for i, line in enumerate(train) if line["tokens"] <= resumed]
                if before:
                    axes.plot(
                        places[before[-1]], losses[before[-1]],
                        "|", color=color, markersize=16, markeredgewidth=1.5,
                    )  # fmt: skip
            named = [(name, lines) for name, lines in run.valid.items() if lines] or [("", [])]
            for place, (name, lines) in enumerate(named):
                label = run.name + (name and f", {name}") + (f"  ({lines[-1]['loss']:.3f})" if lines else "")
                axes.plot(
                    [line[key] for line in lines], [line["loss"] for line in lines], label=label, color=color,
                    linewidth=2.4, linestyle=DASHES[place % len(DASHES)], marker="o", markersize=5.5,
                )  # fmt: skip
            start = HIDDEN_SHARE * run.tokens
            visible += [loss for line, loss in zip(train, losses, strict=True) if line["tokens"] >= start]
            visible += [line["loss"] for _, lines in named for line in lines if line["tokens"] >= start]
        visible = [loss for loss in visible if math.isfinite(loss)]
        if visible:
            margin = 0.05 * (max(visible) - min(visible)) or 0.1
            axes.set_ylim(min(visible) - margin, max(visible) + margin)
        right = max(line[key] for run in runs for line in run.all_lines())
        unit, letter = _unit(right)
        axes.set_xlim(0, 1.02 * right or 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}{letter if value else ''}"))
        axes.set_xlabel("tokens" if x == "tokens" else "updates")
        axes.set_ylabel(f"{'validation ' * validation_only}loss (nats per token)")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        parts = "" if validation_only else "bold: validation, thin: training"
        if not validation_only and any(run.resumed_at for run in runs):
            parts += ", bar: resumed"
        axes.legend(title=parts, title_fontsize=10, frameon=False, alignment="left")
        if title:
            axes.set_title(title, loc="left", fontsize=14)
        for output in outputs:
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(output, dpi=150)
            except OSError as error:
                raise RunError(f"--output {output} cannot be written: {error.strerror}") from None
        pyplot.close(figure)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What to read and what to make of it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="A metrics.jsonl, a folder that holds one (--save), or event files of TensorBoard or their folder "
        "(--tensorboard-dir); NAME=RUN gives it another name.",
    )  # fmt: skip
    parser.add_argument(
        "--output", nargs="+", action="extend", type=Path, default=[], metavar="FILE",
        help="Pictures to write, the format by the ending: .png, .svg or .pdf. Runs stand before it.",
    )  # fmt: skip
    parser.add_argument("--title", help="Title of the picture.")
    parser.add_argument("--x", choices=("tokens", "steps"), default="tokens", help="The horizontal axis.")
    parser.add_argument("--validation-only", action="store_true", help="Do not draw the training loss.")
    parser.add_argument("--table", action="store_true", help="Print the results as a table.")
    arguments = parser.parse_args(argv)
    if not arguments.output and not arguments.table:
        parser.error("nothing to do: give --output FILE, --table or both")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. Every run that cannot be read is named."""
    arguments = parse_args(argv)
    runs, problems = [], []
    for given in arguments.runs:
        try:
            runs.append(read_run(given))
        except RunError as error:
            problems.append(str(error))
    if not problems:
        try:
            if arguments.table:
                print(table(runs))
            if arguments.output:
                draw(runs, arguments.output, arguments.title, arguments.x, arguments.validation_only)
        except RunError as error:
            problems.append(str(error))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
