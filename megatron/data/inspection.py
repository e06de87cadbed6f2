"""What is in a dataset, and whether it is what its manifest says."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data import manifest
from megatron.data.errors import DataError
from megatron.data.files import sha256
from megatron.data.index_file import ANEW, CHUNK, Index, chunks, index_problems, map_tokens, read_index
from megatron.data.tokenizer import Tokenizer

_BAR = 40
_SAMPLE_TOKENS = 200


@dataclasses.dataclass
class DatasetReport:
    """Counts of one dataset."""

    prefix: str
    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    dtype: str
    bytes: int
    """Of the .bin."""
    shortest: int
    median: float
    mean: float
    longest: int
    """Tokens of a document, as are the three before."""
    histogram: list[tuple[int, int]]
    """(upper bound, documents): how many have fewer tokens than the bound and not fewer than the one before."""


def inspect(prefix: str) -> DatasetReport:
    """Count. Raises DataError where the dataset is missing or damaged."""
    index = read_index(prefix)
    if problems := index_problems(index):
        raise DataError(f"{prefix}: {'; '.join(problems)}. {ANEW}")
    counts = np.zeros(64, dtype=np.int64)  # by the number of binary digits of the length
    shortest, longest, tokens = 2**62, 0, 0
    for lengths in _document_lengths(index):
        counts += np.bincount(_digits(lengths), minlength=64)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        tokens += int(lengths.sum())
    last = int(np.flatnonzero(counts).max(initial=-1))
    return DatasetReport(
        prefix=prefix,
        documents=index.documents,
        empty_documents=int(counts[0]),
        sequences=len(index.lengths),
        tokens=tokens,
        dtype=index.dtype.name,
        bytes=os.path.getsize(f"{prefix}.bin"),
        shortest=shortest if index.documents else 0,
        median=_median(index, counts),
        mean=tokens / max(index.documents, 1),
        longest=longest,
        histogram=[(1 << digits, int(counts[digits])) for digits in range(last + 1)],
    )


def text_of(report: DatasetReport, facts: manifest.DatasetManifest | None) -> str:
    """The report for people."""
    lines = [
        f"{report.prefix}: {report.documents:,} documents ({report.empty_documents:,} empty), {report.tokens:,} tokens "
        f"of {report.dtype} in {report.bytes:,} bytes",
        f"tokens of a document: {report.shortest:,} to {report.longest:,}, median {report.median:,.0f}, "
        f"mean {report.mean:,.1f}",
    ]
    if facts:
        tokenizer = facts.tokenizer
        lines.append(
            f"{tokenizer['kind']} of {tokenizer['vocab_size']:,} tokens, fingerprint {tokenizer['fingerprint'][:12]}, "
            f"{'with' if facts.append_eod else 'without'} --append-eod; key {facts.json_key!r} of {len(facts.inputs)} "
            f"input(s), {facts.rejected:,} broken lines left out"
        )
    else:
        lines.append("no manifest: made by another tool")
    most = max((count for _, count in report.histogram), default=0)
    first = next((row for row, (_, count) in enumerate(report.histogram) if count), 0)
    for bound, count in report.histogram[first:]:
        name = "0" if bound == 1 else f"{bound // 2:,} to {bound - 1:,}"
        lines.append(f"{name:>24} {count:>14,} {'#' * round(_BAR * count / max(most, 1))}".rstrip())
    return "\n".join(lines)


def plot(report: DatasetReport, path: str) -> None:
    """The histogram as a picture.

    Raises:
        DataError: matplotlib is not installed, or does not know the kind of picture that the name asks for.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError('--plot needs matplotlib; pip install "megatron-moe[plot]"') from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = ["0" if bound == 1 else f"{bound // 2:,}" for bound, _ in report.histogram]
    axes.bar(names, [count for _, count in report.histogram], width=0.9)
    axes.set_xlabel("tokens of a document, from")
    axes.set_ylabel("documents")
    axes.set_title(f"{Path(report.prefix).name}: {report.documents:,} documents, {report.tokens:,} tokens")
    axes.tick_params(axis="x", rotation=45)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise DataError(f"--plot {path}: {error}") from error


def samples(
    prefix: str, tokenizer: Tokenizer, count: int, seed: int, most_tokens: int = 200
) -> Iterator[tuple[int, str]]:
    """Numbers and decoded beginnings of ``count`` documents, chosen at random."""
    index = read_index(prefix)
    chosen = np.random.default_rng(seed).choice(index.documents, size=min(count, index.documents), replace=False)
    tokens = map_tokens(prefix, index)
    for number in sorted(chosen.tolist()):
        first, last = index.ends[number], index.ends[number + 1]
        start = int(index.offsets[first]) // index.dtype.itemsize if first < last else 0
        length = int(index.lengths[first:last].sum())
        yield number, tokenizer.decode(tokens[start : start + min(length, _SAMPLE_TOKENS)].tolist())


def verify(prefix: str, tokenizer: Tokenizer | None = None) -> tuple[list[str], list[str]]:
    """Read everything and compare it with the manifest.

    Args:
        prefix: the dataset.
        tokenizer: of the run that will read it, if its fingerprint is to be compared.

    Returns:
        Problems, and remarks on what could not be checked.
    """
    try:
        index = read_index(prefix)
        facts = manifest.read(prefix)
    except DataError as error:
        return [str(error)], []
    problems, remarks = index_problems(index), []
    if facts is None:
        remarks.append("there is no manifest: tokenizer, inputs and checksums cannot be checked")
    else:
        found = {"documents": index.documents, "tokens": index.tokens, "dtype": index.dtype.name}
        problems += [
            f"{name}: the manifest says {getattr(facts, name)}, the files {value}"
            for name, value in found.items()
            if getattr(facts, name) != value
        ]
        for name, expected in facts.checksums.items():
            if (digest := sha256(f"{prefix}.{name}")) != expected:
                problems.append(f"{prefix}.{name} has SHA-256 {digest[:12]}..., the manifest says {expected[:12]}...")
        if not facts.checksums:
            remarks.append("the manifest has no checksums: it is of an earlier version")
        for entry in facts.inputs:
            _check_input(entry, problems, remarks)
        if tokenizer and tokenizer.fingerprint != facts.tokenizer["fingerprint"]:
            problems.append(
                f"made with {facts.tokenizer['kind']} {facts.tokenizer['fingerprint'][:12]}, the tokenizer given is "
                f"{tokenizer.kind} {tokenizer.fingerprint[:12]}"
            )
    vocab_size = facts.tokenizer["vocab_size"] if facts else tokenizer.vocab_size if tokenizer else None
    highest = _highest(prefix, index)
    if vocab_size is not None and highest >= vocab_size:
        problems.append(f"token {highest} is outside of the vocabulary, which ends at {vocab_size - 1}")
    return problems, remarks


def _check_input(entry: dict[str, Any], problems: list[str], remarks: list[str]) -> None:
    path = entry["path"]
    if "sha256" not in entry or not os.path.isfile(path):
        remarks.append(f"input {path} cannot be checked: it is not there")
    elif os.path.getsize(path) != entry["bytes"]:
        problems.append(f"input {path} has {os.path.getsize(path)} bytes now, had {entry['bytes']}")
    elif sha256(path, entry.get("start", 0), entry.get("end")) != entry["sha256"]:
        problems.append(f"input {path} has other content than when it was tokenized")


def _highest(prefix: str, index: Index) -> int:
    if not index.tokens:
        return -1
    tokens = map_tokens(prefix, index)
    return max(int(part.max()) for part in chunks(tokens))


def _document_lengths(index: Index) -> Iterator[np.ndarray]:
    for first in range(0, index.documents, CHUNK):
        yield index.document_lengths(first, min(first + CHUNK, index.documents))


def _digits(lengths: np.ndarray) -> np.ndarray:
    """Binary digits of each number: 0 for 0, 1 for 1, 2 for 2 and 3 ..."""
    return np.frexp(lengths.astype(np.float64))[1]


def _median(index: Index, counts: np.ndarray) -> float:
    """Of the documents' lengths; only those with as many binary digits as the median are held in memory."""
    middles = {(index.documents - 1) // 2, index.documents // 2}
    if not index.documents:
        return 0.0
    below = np.concatenate([[0], np.cumsum(counts)])
    wanted = sorted({int(np.searchsorted(below, middle, side="right")) - 1 for middle in middles})
    kept = np.sort(np.concatenate([part[np.isin(_digits(part), wanted)] for part in _document_lengths(index)]))
    start = below[wanted[0]]
    gap = below[wanted[-1]] - below[wanted[0] + 1] if len(wanted) > 1 else 0
    assert gap == 0  # the two middle ones are neighbours
    return float(np.mean([kept[middle - start] for middle in middles]))
