"""PREFIX.json beside PREFIX.bin and PREFIX.idx: what a dataset was made from.

Datasets made by other tools have none; they are read all the same.
"""

import dataclasses
import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron.data.errors import DataError
from megatron.data.files import ESCAPED
from megatron.data.tokenizer import Tokenizer

FORMAT = 2
"""2 has checksums; what format 1 lacks reads as empty."""
_PACKAGES = ("megatron-core", "numpy", "pyarrow", "sentencepiece", "tiktoken", "tokenizers")


@dataclasses.dataclass
class DatasetManifest:
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
    """path, bytes (as on disk) and sha256 of each input file, and start and end where only a part was read."""
    shard: dict[str, int] | None = None
    """index and count, where the dataset is one shard of a corpus."""
    made_from: list[str] = dataclasses.field(default_factory=list)
    """Prefixes of the datasets that this one was merged or cut from."""
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the ``bin`` and the ``idx``."""
    command: str = ""
    """:func:`digest` of the run's inputs (names and sizes), flags and tokenizer, the same for all shards of a corpus;
    of a merged dataset, of the checksums of what it was made from; of one that was cut, of these and its documents."""
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: versions())
    format: int = FORMAT


def digest(value: Any) -> str:
    """SHA-256 of something JSON-able."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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


def write(path: Path, manifest: DatasetManifest) -> None:
    """Write ``manifest`` to ``path``."""
    with open(path, "w", encoding="utf-8", errors=ESCAPED) as file:
        file.write(json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(prefix: str) -> DatasetManifest | None:
    """The manifest of the dataset ``prefix``; None where it has none.

    Raises:
        DataError: the file is no manifest.
    """
    path = path_of(prefix)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format", 1) > FORMAT:
            raise ValueError(f"its format is {found['format']}, this version knows up to {FORMAT}")
        facts = DatasetManifest(**found)
        if problem := _problem(facts):
            raise ValueError(problem)
        return facts
    except (AttributeError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no manifest of tools/preprocess_data.py: {error}. "
            "Move it away if it belongs to something else, or preprocess anew with --overwrite"
        ) from error


_KINDS = {"tokenizer": dict, "inputs": list, "made_from": list, "checksums": dict, "versions": dict}
_KINDS |= {"documents": int, "tokens": int, "rejected": int, "json_key": str, "append_eod": bool, "command": str}


def _problem(facts: DatasetManifest) -> str | None:
    """What a manifest that was damaged, or written by hand, has in the wrong place."""
    for name, kind in _KINDS.items():
        if not isinstance(getattr(facts, name), kind):
            return f"{name} is {getattr(facts, name)!r}"
    parts = [("tokenizer", facts.tokenizer, ("kind", "fingerprint", "vocab_size", "eod"))]
    parts += [("shard", facts.shard, ("index", "count"))] if facts.shard is not None else []
    parts += [("an input", entry, ("path", "bytes")) for entry in facts.inputs]
    for what, part, names in parts:
        if not isinstance(part, dict) or any(name not in part for name in names):
            return f"{what} is {part!r}, expected {', '.join(names)}"
    return None
