"""Compare the models of a scaling ladder: ``report.py --out DIR`` writes DIR/results.json, page.md and figures.

*Body parameters* are those that work on a token without embeddings: of a model with experts one expert's in each MoE
layer. The *effective parameter count* of a model with experts is the size of a dense model of equal loss: the dense
ladder's sizes are interpolated, log size over log loss, never beyond its ends. The same with FLOPs of a token, and with
GPU time alone on the device.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ladder

from megatron.planning.flops import model_flops_per_token
from megatron.planning.parameters import count_parameters
from megatron.planning.plan import count

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5c5c5c")


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of one model. Times are of training alone on the device, on all tokens."""

    name: str
    recipe: str
    experts: int
    body_parameters: int
    parameters: int
    flops_per_token: int
    learning_rate: float
    tokens: int
    losses: list[float]  # of each seed, at the end
    curves: list[dict[int, float]]
    experts_log: list[dict[str, Any]]  # of the first seed: tokens, busiest expert over the mean, dropped share
    seconds: float | None

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.mean(self.losses)

    def loss_at(self, tokens: int) -> float | None:
        """The mean over seeds after so many tokens; None where not all were validated."""
        found = [curve.get(tokens) for curve in self.curves]
        return statistics.mean(x for x in found if x is not None) if None not in found else None

    @property
    def tokens_per_parameter(self) -> float:
        """Of all parameters, experts included."""
        return self.tokens / self.parameters


def size_of_equal_loss(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The size at which a ladder has this loss; None beyond its ends.

    Args:
        points: size and loss of each dense model, in any order.
    """
    by_size = sorted(points)
    for (small, high), (large, low) in itertools.pairwise(by_size):
        if low <= loss <= high and low < high:
            part = math.log(high / loss) / math.log(high / low)
            return small * (large / small) ** part
    return None


def read_results(found: ladder.Ladder) -> dict[str, Result]:
    """The models of which at least one run came to its end, by name."""
    seconds = {job.model.name: _seconds(job.folder, found.tokens) for job in found.time_jobs()}
    results: dict[str, Result] = {}
    for job in found.main_jobs():
        folder = job.folder
        curve = ladder.validation_losses(folder)
        config = job.config
        if max(curve, default=0) < config.training.train_tokens:
            continue
        name, end = job.model.name, curve[max(curve)]
        if name in results:
            results[name].losses.append(end)
            results[name].curves.append(curve)
            continue
        vocab = found.scale.vocabulary
        parameters = count_parameters(config.model, config.moe, vocab)
        embeddings = (vocab + config.model.position_rows) * config.model.hidden_size
        results[name] = Result(
            name, job.model.recipe, max(config.moe.num_experts), parameters.active - embeddings, parameters.total,
            model_flops_per_token(config.model, config.moe, vocab), config.optimizer.lr, max(curve), [end], [curve],
            _experts(folder), seconds.get(name),
        )  # fmt: skip
    return results


def _seconds(folder: Path, tokens: int) -> float | None:
    """To train on all tokens at the speed of the timed updates but for the first ones, which compile."""
    speeds = [line["tokens_per_second"] for line in ladder.metrics(folder).train]
    return tokens / statistics.median(speeds[len(speeds) // 2 :]) if speeds else None


def _experts(folder: Path) -> list[dict[str, Any]]:
    return [
        {"tokens": line["tokens"], "load": max(line["experts"]["load"]), "dropped": statistics.mean(dropped)}
        for line in ladder.metrics(folder).train
        if (dropped := line.get("experts", {}).get("dropped"))
    ]


def comparison(results: dict[str, Result]) -> list[dict[str, Any]]:
    """Each model with experts, with the sizes of the dense models of its recipe that have equal loss."""
    rows = []
    for moe in (each for each in results.values() if each.experts > 1):
        dense = [each for each in results.values() if each.experts == 1 and each.recipe == moe.recipe]
        row: dict[str, Any] = {"model": moe.name, "loss": moe.loss, "tokens_per_parameter": moe.tokens_per_parameter}
        measures: dict[str, Callable[[Result], float | None]] = {
            "body_parameters": lambda each: each.body_parameters,
            "flops_per_token": lambda each: each.flops_per_token,
            "seconds": lambda each: each.seconds,
        }
        for measure, of in measures.items():
            points = [(size, each.loss) for each in dense if (size := of(each)) is not None]
            own, equal = of(moe), size_of_equal_loss(points, moe.loss)
            row[measure] = {"own": own, "dense_of_equal_loss": equal, "ratio": equal / own if equal and own else None}
            ends = [size_of_equal_loss(points, loss) for loss in moe.losses]
            row[measure]["each_seed"] = [end / own if end and own else None for end in ends]
        rows.append(row)
    return rows


def effective_along(moe: Result, results: dict[str, Result]) -> dict[int, float]:
    """The effective parameter count over the body's at each validation within the ladder, by tokens; means of seeds.

    All models are then at the same point of their schedules, and before the end none has come down with its rate.
    """
    dense = [each for each in results.values() if each.experts == 1 and each.recipe == moe.recipe]
    found = {}
    for tokens in moe.curves[0]:
        losses = [(each.body_parameters, each.loss_at(tokens)) for each in dense]
        own, points = moe.loss_at(tokens), [(size, loss) for size, loss in losses if loss is not None]
        equal = None if own is None else size_of_equal_loss(points, own)
        if equal is not None:
            found[tokens] = equal / moe.body_parameters
    return found


def page(results: dict[str, Result], rows: Sequence[dict[str, Any]], device: str, figures: Sequence[str]) -> str:
    """The results in Markdown."""
    first = next(iter(results.values()))
    lines = [
        "# Scaling ladder",
        "",
        f"{device}; {count(first.tokens)} tokens a model, read once, in the same order by all; the same depth, batch "
        "and length of sequences. Losses are of held-out text. Times are of a model alone on the device.",
        "",
        "| model | body parameters | all | tokens a parameter | FLOPs a token | learning rate | validation loss, each "
        "seed | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {each.name} | {count(each.body_parameters)} | {count(each.parameters)} | {each.tokens_per_parameter:.1f} "
        f"| {count(each.flops_per_token)} | {each.learning_rate:.2g} | {', '.join(f'{x:.4f}' for x in each.losses)} "
        f"| {'' if each.seconds is None else f'{each.seconds:.0f} s'} |"
        for each in results.values()
    ]
    lines += [
        "",
        "Sizes of the dense model of equal loss, interpolated between those above, as multiples of the model's own:",
        "",
        "| model | effective parameter count | FLOPs a token | GPU time |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = [_cell(row[measure]) for measure in ("body_parameters", "flops_per_token", "seconds")]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    lines += ["", *(f"![{name}]({name})" for name in figures), ""]
    return "\n".join(lines)


def _cell(measure: dict[str, Any]) -> str:
    if measure["own"] is None:
        return "not timed"
    if measure["ratio"] is None:
        return "outside the ladder"
    seeds = [f"{x:.2f}" if x else "outside" for x in measure["each_seed"]]
    return f"{measure['ratio']:.2f} ×" + (f" ({', '.join(seeds)})" if len(seeds) > 1 else "")


def draw(results: dict[str, Result], out: Path) -> list[str]:
    """Write the figures; their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    plain = [each for each in results.values() if each.name.count("-") == 1]  # no ablations
    colors = {each.name: COLORS[number % len(COLORS)] for number, each in enumerate(plain)}

    def figure(name: str, title: str, x: str, y: str, fill: Callable[[Any], None]) -> None:
        fig, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        fill(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        fig.savefig(out / name, dpi=110)
        pyplot.close(fig)
        drawn.append(name)

    def curves(per_token: Callable[[Result], float | None]) -> Callable[[Any], None]:
        def fill(axes: Any) -> None:
            for each in plain:
                if (scale := per_token(each)) is None:
                    continue
                curve = each.curves[0]
                look: dict[str, Any] = {"color": colors[each.name], "label": each.name}
                axes.plot([x * scale for x in curve], list(curve.values()), "-" if each.experts > 1 else "--", **look)

        return fill

    figure("validation_loss.png", "Validation loss", "tokens", "loss", curves(lambda each: 1.0))
    seconds = curves(lambda each: each.seconds / each.tokens if each.seconds else None)
    figure("loss_over_time.png", "Validation loss over GPU time", "seconds, alone on the device", "loss", seconds)

    def effective(axes: Any) -> None:
        for each in (each for each in plain if each.experts > 1):
            ratios = effective_along(each, results)
            parameters = [tokens / each.parameters for tokens in ratios]
            axes.plot(parameters, list(ratios.values()), "-o", color=colors[each.name], label=each.name)

    title = "Effective parameter count while training, as a multiple of the body"
    figure("effective_parameters.png", title, "tokens a parameter, experts included", "multiple", effective)

    def loads(axes: Any) -> None:
        for each in plain:
            if each.experts_log:
                tokens = [line["tokens"] for line in each.experts_log]
                axes.plot(tokens, [line["load"] for line in each.experts_log], color=colors[each.name], label=each.name)

    figure("loads.png", "Busiest expert over the mean", "tokens", "multiple", loads)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ladder.add_options(parser)
    args = parser.parse_args(argv)
    try:
        found = ladder.load_ladder(args.out, ladder.SCALES[args.scale], args.tokens)
        results = read_results(found)
        if not results:
            raise ValueError(f"{args.out}/runs has no finished run; run the train step first")
        rows = comparison(results)
        figures = draw(results, args.out)
        header = next(filter(None, (ladder.metrics(job.folder).header for job in found.main_jobs())))
        text = page(results, rows, f"{header.get('device', '')}, {header.get('precision', '')}", figures)
        (args.out / "page.md").write_text(text)
        content = {"models": [dataclasses.asdict(each) for each in results.values()], "comparison": rows}
        (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        print(text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
