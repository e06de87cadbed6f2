"""Which files a corpus consists of, and which part of them a shard takes."""

import dataclasses
import glob
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.data.errors import DataError
from megatron.data.files import INDEX_CACHE, sha256

STANDARD_INPUT = "-"
UNREPEATABLE = "while it read standard input, which cannot be read again from where it was"
COMPRESSIONS = (".gz", ".zst")
FORMATS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")


@dataclasses.dataclass(frozen=True)
class Span:
    """The records of one file whose first byte lies in ``[start, end)``, in bytes as the file lies on disk.

    Of a Parquet file the rows of the groups that begin there, were groups all that the file holds.
    """

    path: str
    start: int
    end: int
    size: int
    """Of the whole file; 0 for standard input."""

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end == self.size


def format_of(path: str) -> str:
    """``.txt``, ``.parquet`` or, for everything else, ``.jsonl``, going by the name without .gz or .zst."""
    for suffix in COMPRESSIONS:
        path = path.removesuffix(suffix)
    return next((suffix for suffix in (".txt", ".parquet") if path.endswith(suffix)), ".jsonl")


def find_inputs(words: Sequence[str]) -> list[str]:
    """The files that ``words`` name, each a file, a glob pattern, a folder or ``-``.

    Patterns and folders give their files in the order of their names, so that a corpus is the same on every machine. Of
    a folder and those below it files with a known suffix count, hidden ones not. What the tools of this code base write
    is no input unless it is named itself, so that output may be beside its input.

    Raises:
        DataError: names every word that leads to no readable file, and every file that is there twice.
        OSError: a folder cannot be read.
    """
    paths: list[str] = []
    problems: list[str] = []
    output: list[str] = []
    for word in words:
        if word == STANDARD_INPUT or (os.path.exists(word) and not os.path.isdir(word)):
            found = [word]
        elif os.path.isdir(word):
            found = _not_output(_below(word), output)
            if not found:
                problems.append(f"{word} is a folder without any file that ends in {', '.join(FORMATS)} (.gz, .zst)")
        elif glob.has_magic(word):
            matches = (path for path in glob.glob(word, recursive=True) if not os.path.isdir(path))
            found = _not_output(sorted(matches), output)
            if not found:
                problems.append(f"{word}: no file fits this pattern")
        else:
            found = []
            problems.append(f"{word}: there is no such file")
        problems += [f"{path}: {problem}" for path in found if (problem := _problem(path))]
        paths += found
    places = [os.path.realpath(path) for path in paths]
    problems += (
        [
            f"{path} is given more than once"
            for path in sorted({path for path, place in zip(paths, places, strict=True) if places.count(place) > 1})
        ]
        if len(set(places)) < len(places)
        else []
    )
    if STANDARD_INPUT in paths and len(paths) > 1:
        problems.append("- (standard input) is given beside files; give it alone")
    if not words:
        problems.append("no file is given")
    if problems:
        raise DataError("--input: " + "; ".join(problems))
    if output:
        more = f" and {len(output) - 3} more" if len(output) > 3 else ""
        print(f"left out, as these tools wrote them: {', '.join(output[:3])}{more}", file=sys.stderr)
    return paths


def spans_of(paths: Sequence[str], num_shards: int = 1, shard_index: int = 0, by_line: bool = True) -> list[Span]:
    """What shard ``shard_index`` of ``num_shards`` reads: about a ``num_shards``-th of all bytes, in one part.

    Plain files of lines are cut where a line ends, and Parquet files between groups of rows. A file that is compressed
    or a document belongs as a whole to the shard in which its middle lies. The shards' records, one shard after the
    other, are all records in their order.

    Args:
        paths: as :func:`find_inputs` gives them.
        num_shards: shards of the corpus.
        shard_index: from 0.
        by_line: whether each line of a .txt file is a record.

    Raises:
        DataError: there is no such shard.
    """
    if num_shards < 1 or not 0 <= shard_index < num_shards:
        raise DataError(f"--shard-index {shard_index} of --num-shards {num_shards}: expected 0 to {num_shards - 1}")
    if STANDARD_INPUT in paths:
        if num_shards > 1:
            raise DataError("--input -: standard input cannot be cut into --num-shards; give files")
        return [Span(STANDARD_INPUT, 0, 0, 0)]
    sizes = [os.path.getsize(path) for path in paths]
    low, high = (sum(sizes) * index // num_shards for index in (shard_index, shard_index + 1))
    spans, before = [], 0
    for path, size in zip(paths, sizes, strict=True):
        start, end = max(low - before, 0), min(high - before, size)
        if not _divisible(path, by_line):
            start, end = (0, size) if low <= before + size // 2 < high else (0, 0)
        if start < end or (size == 0 and num_shards == 1):
            spans.append(Span(path, start, end, size))
        before += size
    return spans


def stamps_of(paths: Sequence[str]) -> list[list[Any]]:
    """Path, bytes and time of the last change of each file."""
    stats = [(path, os.stat(path)) for path in paths if path != STANDARD_INPUT]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def empty_shards(paths: Sequence[str], num_shards: int, by_line: bool = True) -> str | None:
    """What to tell a user who asks for more shards than there are files, none of which can be cut; else None."""
    if num_shards <= len(paths) or any(_divisible(path, by_line) for path in paths):
        return None
    return (
        f"--num-shards {num_shards}: there are {len(paths)} files, and compressed files and documents are not cut, so "
        f"at least {num_shards - len(paths)} shards are empty. Give more files or fewer shards"
    )


class Checksums:
    """SHA-256 of each span's bytes, computed by a thread while others work."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = [span for span in spans if span.path != STANDARD_INPUT]
        self._found: list[str] = []
        self._error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def result(self) -> list[str]:
        """Wait for all of them. Raises OSError where a file cannot be read."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._found

    def cancel(self) -> None:
        """Stop working; there is no result."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for span in self._spans:
                self._found.append(sha256(span.path, span.start, span.end, self._stop))
        except OSError as error:
            self._error = error


def _below(folder: str) -> list[str]:
    return sorted(_walk(folder, ()))


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Files below ``folder``; links to folders are followed, but not back to one of those ``above``."""
    place = os.path.realpath(folder)
    if place in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name != INDEX_CACHE:
                    yield from _walk(path, (*above, place))
            elif entry.name.removesuffix(".gz").removesuffix(".zst").endswith(FORMATS):
                yield path


def _not_output(paths: Sequence[str], output: list[str]) -> list[str]:
    """Those that no tool wrote; the others are added to ``output``."""
    kept: list[str] = []
    for path in paths:
        (output if _is_output(path) else kept).append(path)
    return kept


def _is_output(path: str) -> bool:
    """Whether it is what a run has left or is writing: unfinished files, lists, reports, manifests."""
    name = os.path.basename(path)
    if ".incomplete." in name or name.endswith((".rejected.jsonl", ".removed.jsonl", ".cleaning.json")):
        return True
    return path.endswith(".json") and os.path.exists(path.removesuffix(".json") + ".bin")


def _problem(path: str) -> str | None:
    """Why a file cannot be read; None where it can."""
    if path == STANDARD_INPUT:
        return None if sys.stdin is not None else "standard input is closed"
    if not os.path.exists(path):
        return "a link that leads nowhere"
    if not os.path.isfile(path):
        return "no regular file, and it must be read more than once; pipe it into --input -"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    if path.endswith(COMPRESSIONS) and os.path.getsize(path) == 0:
        return "it has 0 bytes, so it was cut off; copy or compress the file anew"
    return None


def _divisible(path: str, by_line: bool) -> bool:
    kind = format_of(path)
    return kind == ".parquet" or (not path.endswith(COMPRESSIONS) and (kind == ".jsonl" or by_line))
