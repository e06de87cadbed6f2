"""Preprocessing runs for tests, and what they leave behind."""

import contextlib
from pathlib import Path

import corpus

from megatron.data import preprocess


def run(folder: Path, texts: list[str] | None, name="out", make=corpus.gpt2, source="in.jsonl", **options):
    """Preprocess in this process; returns the summary."""
    path = folder / source
    if texts is not None:
        corpus.write_jsonl(path, texts)
    options = {"workers": 0, "append_eod": True} | options
    return preprocess.preprocess([str(path)], str(folder / name), make(folder), **options)


def files(folder: Path, name="out_text_document") -> dict[str, bytes]:
    return {suffix: (folder / f"{name}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}


def everything_named(folder: Path, start="out") -> list[str]:
    return sorted(path.name for path in folder.glob(f"*{start}*"))


def children(pid: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(stat.parent.name)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
