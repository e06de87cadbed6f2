"""Results as files: lm-eval's JSON, a Markdown table beside the published one, and a CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from megatron.evaluation.output import write_whole

# task: heading, lm-eval's metric
COLUMNS = {
    "lambada_openai": ("LAMBADA", "acc,none"),
    "piqa": ("PIQA", "acc,none"),
    "boolq": ("BoolQ", "acc,none"),
    "race": ("RACE-h", "acc,none"),
    "triviaqa": ("TriviaQA", "exact_match,remove_whitespace"),
    "webqs": ("WebQs", "exact_match,none"),
}

# Table 1 of the publication: accuracies in the order of COLUMNS
PUBLISHED = {
    "350M": (0.5203, 0.6931, 0.5364, 0.3177, 0.0321, 0.0157),
    "1.3B": (0.6365, 0.7339, 0.6339, 0.3560, 0.1005, 0.0325),
    "6.7B": (0.7194, 0.7671, 0.6703, 0.3742, 0.2347, 0.0512),
    "350M+MoE-128": (0.6270, 0.7459, 0.6046, 0.3560, 0.1658, 0.0517),
    "1.3B+MoE-128": (0.6984, 0.7671, 0.6492, 0.3809, 0.3129, 0.0719),
}


def markdown(name: str, results: dict[str, dict[str, Any]]) -> str:
    """A table of this model's accuracies above the published ones, and of every further metric."""
    tasks = [task for task in COLUMNS if task in results]
    lines = []
    if tasks:
        lines = [_row(["model", *(COLUMNS[task][0] for task in tasks)]), _row(["---", *("---:" for _ in tasks)])]
        lines.append(_row([f"**{name}**", *(f"{results[task][COLUMNS[task][1]]:.4f}" for task in tasks)]))
        for model, values in PUBLISHED.items():
            by_task = dict(zip(COLUMNS, values, strict=True))
            lines.append(_row([f"{model} (published)", *(f"{by_task[task]:.4f}" for task in tasks)]))
        lines.append("")
    lines += [_row(["task", "metric", "value", "stderr"]), _row(["---", "---", "---:", "---:"])]
    lines += [_row([task, metric, _number(value), _number(error)]) for task, metric, value, error in rows(results)]
    return "\n".join(lines) + "\n"


def rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, float, Any]]:
    """(task, metric, value, standard error or "N/A"), each metric once."""
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                found.append((task, key, value, metrics.get(f"{metric}_stderr,{kind}", "N/A")))
    return found


def write(folder: Path, name: str, results: dict[str, Any]) -> str:
    """Write results.json, results.md and results.csv, each at once; returns the Markdown."""
    from lm_eval.utils import handle_non_serializable

    table = markdown(name, results["results"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "task", "metric", "value", "stderr"])
    writer.writerows([name, *row] for row in rows(results["results"]))
    dumped = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    for file, content in (("results.json", dumped + "\n"), ("results.md", table), ("results.csv", text.getvalue())):
        write_whole(folder / file, content)
    return table


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)
