"""Draw the loss curves of runs, and print their results as a table.

    python tools/plot_runs.py RUN [RUN ...] --output loss_curves.png --table

A RUN is a ``metrics.jsonl`` or the folder that holds one (the run's ``--save``). Training loss is the thin line,
smoothed; validation loss the bold one with marks. What a run logged beyond the point that it was later resumed from
is left out.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5c5c5c")
SMOOTHED_SHARE = 0.02  # each point of the training curve averages this share of the run
HIDDEN_SHARE = 0.03  # the first fall of the loss, up to this share of the run, does not set the height of the picture


class RunError(ValueError):
    """A run that cannot be read or drawn."""


@dataclasses.dataclass
class Run:
    """What one run logged, without superseded lines; tokens rise strictly in ``train`` and in ``valid``."""

    name: str
    header: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    valid: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    resumed_at: list[int] = dataclasses.field(default_factory=list)

    def forget_after(self, tokens: int) -> None:
        """Drop what was logged beyond ``tokens`` consumed tokens."""
        self.train = [line for line in self.train if line["tokens"] <= tokens]
        self.valid = [line for line in self.valid if line["tokens"] <= tokens]
        self.resumed_at = [resumed for resumed in self.resumed_at if resumed < tokens]

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of the log. A loss of None (every update was skipped) becomes NaN."""
        if line["kind"] == "run":
            resumed = line.get("resumed_at_tokens") or 0
            self.forget_after(resumed)
            self.header = line
            self.name = line.get("name") or self.name
            if resumed:
                self.resumed_at.append(resumed)
        elif line["kind"] in ("train", "valid"):
            tokens, loss = line["tokens"], line["loss"]
            lines = self.train if line["kind"] == "train" else self.valid
            while lines and lines[-1]["tokens"] >= tokens:
                lines.pop()
            lines.append(line | {"loss": math.nan if loss is None else loss})

    @property
    def tokens(self) -> int:
        """Tokens consumed at the last line."""
        return max((lines[-1]["tokens"] for lines in (self.train, self.valid) if lines), default=0)

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss, in nats a token."""
        return self.valid[-1]["loss"] if self.valid else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the training lines."""
        rates = [line["tokens_per_second"] for line in self.train if line.get("tokens_per_second")]
        return statistics.median(rates) if rates else None


def read_run(path: Path) -> Run:
    """Read a ``metrics.jsonl``, or the one in a folder.

    Raises:
        RunError: there is none, or nothing in it can be drawn.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        hint = "there is no metrics.jsonl in this folder" if path.is_dir() else "there is no such file"
        raise RunError(f"{path}: {hint}; give a metrics.jsonl or the --save folder of a run")
    run = Run(name=(file.parent.name if file.name == "metrics.jsonl" else file.stem))
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            run.add(json.loads(text))
        except json.JSONDecodeError:  # a run that was killed leaves half a line
            print(f"{file}:{number}: left out, not JSON: {text[:60]}", file=sys.stderr)
        except (AttributeError, KeyError, TypeError) as error:
            raise RunError(
                f'{file}:{number}: expected {{"kind": "run", "train" or "valid", "tokens": ..., "loss": ...}}, '
                f"got {text[:80]} ({type(error).__name__}: {error})"
            ) from error
    if not run.train and not run.valid:
        raise RunError(f"{file}: no training or validation line to draw; has the run logged anything yet?")
    return run


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
    """One row a run, then a sentence for each run after the first that compares the validation losses."""
    rows = [("run", "parameters", "active", "tokens", "validation loss", "tokens/s")]
    for run in runs:
        loss, rate = run.validation_loss, run.tokens_per_second
        rows.append(
            (
                run.name,
                count(run.header.get("parameters")),
                count(run.header.get("active_parameters")),
                count(run.tokens),
                "-" if loss is None else f"{loss:.4f}",
                "-" if rate is None else f"{rate:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])))
    lines = []
    for name, *cells in rows:
        padded = [name.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines + [comparison(runs[0], run) for run in runs[1:]])


def comparison(first: Run, other: Run) -> str:
    """A sentence that says which of two runs has the lower validation loss, and by how much."""
    if first.validation_loss is None or other.validation_loss is None:
        return f"{other.name} and {first.name} cannot be compared: one of them has no validation yet."
    difference = other.validation_loss - first.validation_loss
    if not math.isfinite(difference):
        return f"{other.name} and {first.name} cannot be compared: a validation loss is not finite."
    verdict = f"{abs(difference):.4f} {'lower' if difference < 0 else 'higher'} than" if difference else "the same as"
    if other.valid[-1]["tokens"] == first.valid[-1]["tokens"]:
        clock = f"the same {count(other.valid[-1]['tokens'])} tokens"
    else:
        clock = f"{count(other.valid[-1]['tokens'])} tokens against {count(first.valid[-1]['tokens'])}"
    return f"The validation loss of {other.name} is {verdict} that of {first.name}, after {clock}."


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over ``window`` points, fewer at the ends; non-finite values are left out."""
    half = window // 2
    result = []
    for middle in range(len(values)):
        near = [value for value in values[max(0, middle - half) : middle + half + 1] if math.isfinite(value)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def draw(runs: Sequence[Run], output: Path, title: str | None = None, x: str = "tokens") -> None:
    """Write the picture; PNG, SVG or PDF by the name of ``output``.

    Raises:
        RunError: matplotlib is missing, or it knows no format of that name.
    """
    try:
        import matplotlib
    except ImportError:
        raise RunError('drawing needs matplotlib, the [plot] extra: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    key = {"tokens": "tokens", "steps": "step"}[x]
    style = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "plot_runs"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        if output.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
            raise RunError(f"got --output {output}; expected a name that ends in .png, .svg or .pdf")
        visible: list[float] = []
        for index, run in enumerate(runs):
            color = COLORS[index % len(COLORS)]
            window = max(1, round(SMOOTHED_SHARE * len(run.train)))
            losses = smooth([line["loss"] for line in run.train], window)
            places = [line[key] for line in run.train]
            axes.plot(places, losses, color=color, linewidth=1, alpha=0.55)
            for resumed in run.resumed_at:
                before = [i for i, line in enumerate(run.train) if line["tokens"] <= resumed]
                if before:
                    axes.plot(
                        places[before[-1]], losses[before[-1]],
                        "|", color=color, markersize=16, markeredgewidth=1.5,
                    )  # fmt: skip
            label = run.name
            if run.validation_loss is not None:
                label += f"  ({run.validation_loss:.3f})"
            axes.plot(
                [line[key] for line in run.valid], [line["loss"] for line in run.valid],
                color=color, linewidth=2.4, marker="o", markersize=5.5, label=label,
            )  # fmt: skip
            start = HIDDEN_SHARE * run.tokens
            visible += [loss for line, loss in zip(run.train, losses, strict=True) if line["tokens"] >= start]
            visible += [line["loss"] for line in run.valid if line["tokens"] >= start]
        visible = [loss for loss in visible if math.isfinite(loss)]
        if visible:
            margin = 0.05 * (max(visible) - min(visible)) or 0.1
            axes.set_ylim(min(visible) - margin, max(visible) + margin)
        right = max(line[key] for run in runs for line in run.train + run.valid)
        unit, letter = _unit(right)
        axes.set_xlim(0, 1.02 * right)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}{letter if value else ''}"))
        axes.set_xlabel("tokens" if x == "tokens" else "updates")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        parts = "bold: validation, thin: training"
        if any(run.resumed_at for run in runs):
            parts += ", bar: resumed"
        axes.legend(title=parts, title_fontsize=10, frameon=False, alignment="left")
        if title:
            axes.set_title(title, loc="left", fontsize=14)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="A metrics.jsonl, or a folder that holds one."
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="Picture to write: .png, .svg or .pdf.")
    parser.add_argument("--title", help="Title of the picture.")
    parser.add_argument("--x", choices=("tokens", "steps"), default="tokens", help="The horizontal axis.")
    parser.add_argument("--table", action="store_true", help="Print the results as a table.")
    arguments = parser.parse_args(argv)
    if arguments.output is None and not arguments.table:
        parser.error("nothing to do: give --output FILE, --table or both")
    try:
        runs = [read_run(path) for path in arguments.runs]
        if arguments.table:
            print(table(runs))
        if arguments.output is not None:
            draw(runs, arguments.output, arguments.title, arguments.x)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
