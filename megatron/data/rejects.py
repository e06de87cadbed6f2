"""The broken records of a corpus: written down, counted, and too many are an error."""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import NoReturn

from megatron.data.errors import DataError
from megatron.data.files import ESCAPED
from megatron.data.reading import Batch, lines_before

_EXAMPLES = 3


class Rejects:
    """PREFIX.rejected.jsonl, a line of JSON for each: file, line (row of a Parquet file), reason, text.

    Until :func:`publish` it is called PREFIX.incomplete.rejected.jsonl.

    Args:
        prefix: the run's --output-prefix.
        largest_share: of records that may be broken.
        total_bytes: of all input, 0 if that is not known.

    Raises:
        DataError: that is no share.
    """

    def __init__(self, prefix: str, largest_share: float, total_bytes: int) -> None:
        if not 0 <= largest_share <= 1:
            raise DataError(f"--max-rejected {largest_share}: expected a share between 0 and 1, such as 0.001")
        self.path, self._final = Path(f"{prefix}.incomplete.rejected.jsonl"), Path(f"{prefix}.rejected.jsonl")
        self.count = 0
        self._share, self._total_bytes = largest_share, total_bytes
        self._records = 0
        self._examples: list[str] = []
        self._lines_before = functools.cache(lines_before)

    def check_free(self) -> None:
        """Raise DataError where there is a list of another run, such as one of other keys under the same prefix."""
        if os.path.lexists(self._final):
            raise DataError(f"{self._final} exists already; give --overwrite or another --output-prefix")

    def open(self, state: dict[str, int] | None = None) -> None:
        """Begin, or go on from a state that :meth:`sync` gave."""
        state = state or {"records": 0, "count": 0, "bytes": 0}
        self._records, self.count = state["records"], state["count"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+", encoding="utf-8", errors=ESCAPED)  # noqa: SIM115 - closed by close()
        if os.path.getsize(self.path) < state["bytes"]:
            self._file.close()
            raise DataError(f"{self.path} is shorter than it was: the disk lost data. Start over with --overwrite")
        self._file.truncate(state["bytes"])
        self._file.seek(0)
        for line in self._file:
            record = json.loads(line)
            self._note(record)
            if len(self._examples) == _EXAMPLES:
                break
        self._file.seek(0, os.SEEK_END)

    def add(self, batch: Batch, rejected: list[tuple[int, str, str]]) -> None:
        """Note a batch's broken records. Raises DataError once the limit is sure to be broken.

        Sure means: twice as many as the limit allows in as many records as all files have, going by the bytes read.
        """
        self._records += len(batch.records)
        for number, reason, text in rejected:
            line = number + self._lines_before(batch.span)
            record = {"file": batch.span.path, "line": line, "reason": reason, "text": text}
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.count += 1
            self._note(record)
        all_records = self._records * self._total_bytes / max(batch.consumed, 1)
        if self._total_bytes and self.count > 100 and self.count > 2 * self._share * all_records:
            self._fail(f"already {self.count} of the first {self._records} lines are broken")

    def check(self) -> None:
        """Raise DataError where more records are broken than allowed."""
        if self.count > self._share * self._records:
            self._fail(f"{self.count} of {self._records} lines are broken")

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk; the state is what :meth:`open` goes on from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"records": self._records, "count": self.count, "bytes": os.path.getsize(self.path)}

    def close(self) -> None:
        """Let go of the list, and leave it where it is if there is something in it."""
        with contextlib.suppress(OSError):  # flushing to a full disk
            self._file.close()
        if self.count == 0:
            self.path.unlink(missing_ok=True)

    def _note(self, record: dict) -> None:
        if len(self._examples) < _EXAMPLES:
            self._examples.append(f"{record['file']}, line {record['line']}: {record['reason']}")

    def _fail(self, what: str) -> NoReturn:
        self._file.flush()
        raise DataError(
            f"{what}, more than --max-rejected {self._share:g} allows. Nothing was published; they are listed in "
            f"{self.path}. The first:\n  "
            + "\n  ".join(self._examples)
            + '\nExpected one object a line, such as {"text": "..."}. Mend the input, name the right --json-keys, '
            "or raise --max-rejected to do without those lines"
        )


def publish(prefix: str, count: int) -> str | None:
    """Give the list of a finished run its final name and return that; where nothing was rejected, remove an old one."""
    unfinished, final = Path(f"{prefix}.incomplete.rejected.jsonl"), Path(f"{prefix}.rejected.jsonl")
    if count == 0:
        final.unlink(missing_ok=True)
        return None
    if unfinished.exists():  # else an interrupted run has renamed it
        os.replace(unfinished, final)
    return str(final)
