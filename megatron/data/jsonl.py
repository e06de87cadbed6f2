"""From a record of a corpus to the texts of a document: strict, and with a reason where there is none."""

import json
from collections.abc import Sequence
from typing import Any

from megatron.data.errors import DataError

_BOM = b"\xef\xbb\xbf"


def record_texts(record: Any, kind: str, keys: Sequence[str], first: bool = False) -> list[str] | None:
    """The texts under ``keys`` of one record; None where it is a blank line.

    Args:
        record: as :class:`megatron.data.reading.Batch` has it.
        kind: of the batch.
        keys: which fields to take. A text file has but one field, whatever the key.
        first: whether it is a file's first record, so that a byte-order mark may precede it.

    Raises:
        DataError: the record is broken. The message is a reason without file and line number.
    """
    if kind == "json":
        return document_texts(record, keys, first)
    if kind == "row":
        return fields(record, keys)
    if first:
        record = record.removeprefix(_BOM)
    if kind == "line":
        record = record.removesuffix(b"\n").removesuffix(b"\r")
        if not record:
            return None
    return [_decoded(record)] * len(keys)


def document_texts(line: bytes, keys: Sequence[str], first_line: bool = False) -> list[str] | None:
    """The texts under ``keys`` of one JSON line; None where the line is blank.

    Args:
        line: the line, with or without its line end.
        keys: which fields to take.
        first_line: whether a byte-order mark may precede it.

    Raises:
        DataError: the line is no UTF-8, no JSON object, or a field is missing or no text. The message is a reason
            without file and line number.
    """
    if first_line:
        line = line.removeprefix(_BOM)
    if not line.strip():
        return None
    text = _decoded(line)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"not usable JSON: {error}") from None
    except RecursionError:
        raise DataError("not usable JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise DataError(f'a JSON {_NAMES[type(record)]}, expected an object such as {{"{keys[0]}": "..."}}')
    return fields(record, keys)


def fields(record: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """The texts under ``keys``. Raises DataError where one is missing or is no valid text."""
    texts = []
    for key in keys:
        if key not in record:
            has = ", ".join(map(repr, list(record)[:5])) or "none"
            raise DataError(f"no key {key!r}; its keys: {has}")
        text = record[key]
        if isinstance(text, bytes):  # of a Parquet file
            raise DataError(f"{key!r} is bytes, expected a string in UTF-8")
        if not isinstance(text, str):
            raise DataError(f"{key!r} is a JSON {_NAMES.get(type(text), type(text).__name__)}, expected a string")
        try:
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{key!r} has half a surrogate pair at character {error.start}: no valid text") from None
        texts.append(text)
    return texts


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte {data[error.start]:#04x} at position {error.start}") from None


_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}
_NAMES[type(None)] = "null"
