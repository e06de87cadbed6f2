"""Results as files: lm-eval's own, a Markdown table beside the published one, and a CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from megatron.evaluation.output import write_whole

SOURCE = "megatron"  # of the model, where lm-eval's own backends have "hf" or "vllm"

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


def write(folder: Path, name: str, results: dict[str, Any], begun: float) -> str:
    """Write results.json, results.md and results.csv, each at once, and lm-eval's own files in a folder of the model's
    name; returns the Markdown.

    Args:
        folder: where to.
        name: of the model.
        results: lm-eval's, maybe with samples; its tracker's fields are added.
        begun: ``time.perf_counter()`` when the evaluation began.

    Raises:
        OSError: a file cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import handle_non_serializable

    table = markdown(name, results["results"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "task", "metric", "value", "stderr"])
    writer.writerows([name, *row] for row in rows(results["results"]))
    samples = results.pop("samples", {})
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.start_time = begun
    tracker.general_config_tracker.log_experiment_args(SOURCE, {"model": name}, None, None, True)
    tracker.save_results_aggregated(results, samples)
    whole = results | ({"samples": samples} if samples else {})
    dumped = json.dumps(whole, indent=2, default=handle_non_serializable, ensure_ascii=False)
    for file, content in (("results.json", dumped + "\n"), ("results.md", table), ("results.csv", text.getvalue())):
        write_whole(folder / file, content)
    for task, lines in samples.items():  # which are changed by it
        tracker.save_results_samples(task, lines)
    sanitized = tracker.general_config_tracker.model_name_sanitized
    assert sanitized is not None  # set by log_experiment_args
    _check_written(folder / sanitized, getattr(tracker, "date_id", ""), samples)
    return table


def _check_written(folder: Path, date: str, samples: dict[str, list[Any]]) -> None:
    """Raises OSError where lm-eval's tracker failed, which it tells in its log alone."""
    files = {f"results_{date}.json": 1} | {f"samples_{task}_{date}.jsonl": len(of) for task, of in samples.items()}
    for name, least in files.items():
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        complete = content.endswith(b"}") if name.endswith(".json") else content.count(b"\n") == least
        if not complete:
            raise OSError(f"{folder / name} could not be written; is the disk full? The same command writes it again")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value)
