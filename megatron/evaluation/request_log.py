"""Finished requests on disk, so that a killed evaluation goes on where it was."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron.data.files import try_lock


def key_of(kind: str, *arguments: Any) -> str:
    """A request's name: the same for the same kind and arguments, whatever the run."""
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()


class RequestLog:
    """Answers by request, a JSON line each; the first line says which model and settings they are of.

    Until it is closed, no other process gets the file.

    Args:
        path: the file; it is made.
        about: what the answers depend on.

    Raises:
        ValueError: the file is of another model or other settings, or is not such a file; or another evaluation has it.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self._about = json.loads(json.dumps(about))
        self.answers: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held = path.open("ab")
        try:
            if try_lock(self._held) is False:
                raise ValueError(
                    f"{path}: another evaluation is writing there; wait for it, or choose another --output"
                )
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others have the file."""
        self._held.close()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a killed run may leave half a line
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            found, entries = (lines[0]["about"], lines[1:]) if lines else (self._about, [])
            self.answers = {entry["key"]: entry["answer"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error!r}); remove it, and the requests start over") from None
        if found != self._about:
            names = [name for name in self._about if found.get(name) != self._about[name]]
            differences = "; ".join(f"{name} was {found.get(name)!r}, is {self._about[name]!r}" for name in names)
            raise ValueError(
                f"{self.path} is of another evaluation: {differences}. Choose another --output, or remove it"
            )
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, answers: dict[str, Any]) -> None:
        """Keep these answers, in memory and on disk."""
        self.answers |= answers
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps({"about": self._about}) + "\n")
            file.writelines(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())
