"""From a record to texts: strict, and the reasons are clear."""

import pytest

from megatron.data.errors import DataError
from megatron.data.jsonl import document_texts, record_texts


def test_texts_of_a_line():
    assert document_texts(b'{"text": "a\\nb", "id": 1}\r\n', ["text"]) == ["a\nb"]
    assert document_texts(b'{"a": "1", "b": "2"}', ["b", "a"]) == ["2", "1"]
    assert document_texts('\ufeff{"text": "é"}'.encode(), ["text"], first_line=True) == ["é"]
    assert document_texts(rb'{"text": "\ud83d\ude42"}', ["text"]) == ["🙂"]
    assert document_texts(b" \r\n", ["text"]) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 10"),
        (b'["text"]', "a JSON array, expected an object"),
        (b"null", "a JSON null"),
        (b'{"txt": "a"}', "no key 'text'; its keys: 'txt'"),
        (b'{"text": null}', "'text' is a JSON null, expected a string"),
        (b'{"text": ["a"]}', "'text' is a JSON array, expected a string"),
        (rb'{"text": "a\ud800b"}', "half a surrogate pair at character 1"),
        ('\ufeff{"text": "mark within the file"}'.encode(), "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_reasons_for_broken_lines(line, reason):
    with pytest.raises(DataError) as error:
        document_texts(line, ["text"])
    assert reason in str(error.value)


def test_a_number_that_python_refuses_is_a_reason_too():
    with pytest.raises(DataError, match="not usable JSON"):
        document_texts(b'{"text": "a", "n": ' + b"1" * 5000 + b"}", ["text"])


def test_texts_of_other_records():
    assert record_texts(b"\xef\xbb\xbfa\r\n", "line", ["text"], first=True) == ["a"]
    assert record_texts(b" a \n", "line", ["x", "y"]) == [" a ", " a "]
    assert record_texts(b"\r\n", "line", ["text"]) is None
    assert record_texts(b"\xef\xbb\xbfa\r\n\r\n", "whole", ["text"], first=True) == ["a\r\n\r\n"]
    assert record_texts({"text": "a", "id": "b"}, "row", ["id", "text"]) == ["b", "a"]
    for record, kind, reason in ((b"\xff", "line", "not UTF-8"), ({"text": None}, "row", "'text' is a JSON null")):
        with pytest.raises(DataError, match=reason):
            record_texts(record, kind, ["text"])
