"""What the benchmarks write beside their tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def device_name(device: str) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


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
