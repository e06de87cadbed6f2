"""What all benchmarks have in common: the arguments, the table, and the JSON beside it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_parser(
    doc: str | None,
    *,
    device: bool = True,
    dtype: bool = False,
    repeats: tuple[int, str] | None = None,
    profile: str | None = None,
) -> argparse.ArgumentParser:
    """A parser that shows a benchmark's docstring, with ``--json`` and the other arguments that benchmarks share.

    Args:
        doc: the module's docstring.
        device: whether there is a ``--device``; None stands for cuda where there is a GPU.
        dtype: whether there is a ``--dtype``.
        repeats: default of ``--repeats`` and what is repeated.
        profile: what ``--profile`` prints, if there is one.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"Default here: {default}.")
    if dtype:
        parser.add_argument(
            "--dtype", choices=tuple(DTYPES), default="bf16", help="Of tokens and weights (default: bf16)."
        )
    if repeats:
        number, what = repeats
        parser.add_argument(
            "--repeats", type=int, default=number, metavar="N",
            help=f"{what}; the median counts (default: {number}).",
        )  # fmt: skip
    if profile:
        parser.add_argument("--profile", action="store_true", help=profile)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the table, unrounded, and its setting there.")
    return parser


def device_name(device: str) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def number(value: float | None, digits: int) -> str:
    """A cell of a table; empty for what was not measured."""
    return "" if value is None else f"{value:,.{digits}f}"


def markdown(columns: str, rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        columns: names with ``|`` between them; one that starts with ``<`` is aligned left, the others right.
        rows: a cell for each column.
    """
    names = [name.strip() for name in columns.split("|")]
    rule = "|" + "|".join("---" if name.startswith("<") else "---:" for name in names) + "|"
    head, *body = ("| " + " | ".join(cells) + " |" for cells in [[name.removeprefix("<") for name in names], *rows])
    return "\n".join([head, rule, *body])


def one_line(error: Exception) -> str:
    """What went wrong, short."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def write_json(file: Path | None, device: str, rows: Sequence[Any], **setting: Any) -> None:
    """Rows (of a dataclass) and how they were measured, as JSON; nothing without a file."""
    if file is not None:
        content = {
            "device": device_name(device),
            "torch": torch.__version__,
            **setting,
            "rows": [vars(r) for r in rows],
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
