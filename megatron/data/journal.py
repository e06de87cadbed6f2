"""How far a run has come, so that the same command goes on from there after a kill."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron.data.errors import DataError
from megatron.data.files import take_lock


class Journal:
    """PREFIX.incomplete.journal: what the run is, and the newest point up to which everything is on the disk.

    Until :meth:`close` no other process can have a journal of the same prefix; PREFIX.incomplete.lock sees to that.

    Args:
        prefix: the run's --output-prefix.
        identity: what must be the same for a run to go on; JSON-able.
        overwrite: whether the journal of another run may be dropped.

    Raises:
        DataError: there is one of another run, or another process has it.
    """

    def __init__(self, prefix: str, identity: dict[str, Any], overwrite: bool) -> None:
        self.path = Path(f"{prefix}.incomplete.journal")
        self._identity = json.loads(json.dumps(identity))
        self.last: dict[str, Any] | None = None
        """The newest point; None where the run begins."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(f"{prefix}.incomplete.lock", "ab")  # noqa: SIM115 - held until close
        try:
            take_lock(self._lock, prefix)
        except BaseException:
            self._lock.close()
            raise
        try:
            self._read(overwrite)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def begun(prefix: str) -> bool:
        """Whether a run under this prefix is under way, or was stopped."""
        return any(os.path.exists(f"{prefix}.incomplete.{name}") for name in ("journal", "lock"))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the prefix."""
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def _read(self, overwrite: bool) -> None:
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            theirs, last = found["run"], found["point"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is damaged: {error}. Remove it to start over") from error
        if theirs == self._identity:
            self.last = last
        elif not overwrite:
            differing = [key for key in {**self._identity, **theirs} if theirs.get(key) != self._identity.get(key)]
            raise DataError(
                f"{self.path} is of an unfinished run that is another one: it differs in {', '.join(differing)}. "
                "Give that run's flags and files to go on with it, or --overwrite to drop what it has done"
            )

    def save(self, point: dict[str, Any]) -> None:
        """Note a point. What it speaks of must be on the disk."""
        aside = self.path.with_name(self.path.name + ".new")
        try:
            with open(aside, "w", encoding="utf-8") as file:
                json.dump({"run": self._identity, "point": point}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)
        self.last = point

    def remove(self) -> None:
        """The run is finished, or starts over."""
        self.path.unlink(missing_ok=True)
        self.last = None
