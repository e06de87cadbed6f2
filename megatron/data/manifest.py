"""PREFIX.json beside PREFIX.bin and PREFIX.idx: what a dataset was made from.

Datasets made by other tools have none; they are read all the same.
"""

import dataclasses
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer

FORMAT = 1
_PACKAGES = ("megatron-core", "numpy", "tokenizers", "sentencepiece")


@dataclasses.dataclass
class Manifest:
    """The facts of one dataset; depends only on its inputs and flags, never on the number of workers or the time."""

    tokenizer: dict[str, Any]
    """kind, fingerprint, vocab_size and eod."""
    json_key: str
    append_eod: bool
    dtype: str
    documents: int
    tokens: int
    rejected: int
    """Input lines that were left out because they are broken."""
    inputs: list[dict[str, Any]]
    """path and bytes (as on disk) of each input file."""
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: versions())
    format: int = FORMAT


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's section about the tokenizer."""
    return {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


def versions() -> dict[str, str]:
    """Versions of what decides about the bytes of a dataset."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def path_of(prefix: str) -> Path:
    """Where the manifest of the dataset ``prefix`` lies."""
    return Path(f"{prefix}.json")


def write(path: Path, manifest: Manifest) -> None:
    """Write ``manifest`` to ``path``."""
    path.write_text(json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(prefix: str) -> Manifest | None:
    """The manifest of the dataset ``prefix``; None where it has none.

    Raises:
        DataError: the file is no manifest.
    """
    path = path_of(prefix)
    if not path.exists():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no manifest of tools/preprocess_data.py: {error}. "
            "Move it away if it belongs to something else, or preprocess anew with --overwrite"
        ) from error
