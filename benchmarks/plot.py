"""Draw what benchmarks.moe_layer has measured: a panel for each size, a bar for each layer and number of experts.

    python -m benchmarks.plot moe_layer.json --out moe_layer.png

Bars are milliseconds of forward and backward with even experts, the thin line on a bar goes to those with skewed ones,
and the dashed line is the dense layer. Needs matplotlib, the extra "plot".
"""

import argparse
import json
from pathlib import Path
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5c5c5c")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="What benchmarks.moe_layer wrote with --json.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="The picture: .png, .svg or .pdf.")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Read and draw.

    Raises:
        SystemExit: matplotlib is not installed, or the file is not one of benchmarks.moe_layer.
    """
    args = parse_args(words)
    content = json.loads(args.file.read_text())
    if not content.get("rows") or "even_ms" not in content["rows"][0]:
        raise SystemExit(f"{args.file}: expected the JSON of benchmarks.moe_layer, found no even_ms in its rows")
    draw(content, args.out)


def draw(content: dict[str, Any], out: Path) -> None:
    """One picture of all rows."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f'{error}; install it with pip install -e ".[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = content["rows"]
    sizes = list(dict.fromkeys((row["hidden"], row["tokens"]) for row in rows))
    names = list(dict.fromkeys(row["layer"] for row in rows if row["layer"] != "dense"))
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4.5), squeeze=False)
    for panel, (hidden, tokens) in zip(panels[0], sizes, strict=True):
        here = [row for row in rows if (row["hidden"], row["tokens"]) == (hidden, tokens)]
        experts = sorted({row["experts"] for row in here if row["layer"] != "dense"})
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            bars = [row for row in here if row["layer"] == name]
            places = [experts.index(row["experts"]) + (number - (len(names) - 1) / 2) * width for row in bars]
            even = [row["even_ms"] for row in bars]
            panel.bar(places, even, width, color=COLORS[number % len(COLORS)], label=name)
            panel.vlines(places, even, [row["skewed_ms"] for row in bars], color="black", linewidth=0.8)
        dense = next(row["even_ms"] for row in here if row["layer"] == "dense")
        panel.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense, same FLOPs")
        panel.set_xticks(range(len(experts)), [f"{number} experts" for number in experts])
        panel.set_title(f"hidden {hidden}, {tokens} tokens")
        panel.set_ylabel("ms, forward + backward")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{content['device']}, torch {content['torch']}, {content['dtype']}", fontsize="small")
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
