"""Reading JSON lines: any compression, damage is noticed, reasons are clear."""

import gzip

import corpus
import pytest
import zstandard

from megatron.data.errors import DataError
from megatron.data.jsonl import check_inputs, document_texts, read_batches


def lines_of(*paths, batch_bytes=1000):
    return [line for batch in read_batches([str(path) for path in paths], batch_bytes) for line in batch.lines]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_and_their_numbers(suffix, tmp_path):
    texts = corpus.english(60) + corpus.NASTY
    plain = corpus.write_jsonl(tmp_path / "plain", texts).read_bytes().splitlines(keepends=True)
    path = corpus.write_jsonl(tmp_path / f"file{suffix}", texts)
    for batch_bytes in (1, 1000, 10**9):
        number = 1
        for batch in read_batches([str(path)], batch_bytes):
            assert batch.first == number
            assert batch.lines == plain[number - 1 : number - 1 + len(batch.lines)]
            assert 0 < batch.consumed <= path.stat().st_size
            number += len(batch.lines)
        assert number == len(plain) + 1
        assert batch.consumed == path.stat().st_size


def test_several_files_count_their_own_lines(tmp_path):
    paths = [corpus.write_jsonl(tmp_path / name, corpus.english(5)) for name in ("a.jsonl", "b.jsonl.gz")]
    batches = list(read_batches([str(path) for path in paths]))
    assert [(batch.path, batch.first, len(batch.lines)) for batch in batches] == [
        (str(paths[0]), 1, 5),
        (str(paths[1]), 1, 5),
    ]
    assert batches[-1].consumed == check_inputs([str(path) for path in paths])


@pytest.mark.parametrize("content", [b"", b'{"text": "no line end"}'])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_empty_and_unfinished_last_lines(content, compress, tmp_path):
    suffix = {bytes: "", gzip.compress: ".gz"}.get(compress, ".zst")
    path = tmp_path / f"file.jsonl{suffix}"
    path.write_bytes(compress(content))
    assert lines_of(path) == ([content] if content else [])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_damaged_compression_is_an_error(suffix, damage, tmp_path):
    path = corpus.write_jsonl(tmp_path / f"file.jsonl{suffix}", corpus.english(300))
    content = bytearray(path.read_bytes())
    if damage == "cut off":
        del content[-20:]
    else:
        content[100:140] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"file\.jsonl.*damaged or cut off after line \d+"):
        lines_of(path)


def test_inputs_are_checked_together(tmp_path):
    good = corpus.write_jsonl(tmp_path / "good.jsonl", ["x"])
    with pytest.raises(DataError) as error:
        check_inputs([str(good), str(good), str(tmp_path), "/no/such/file"])
    for words in ("good.jsonl is given more than once", "is a folder", "/no/such/file: there is no such file"):
        assert words in str(error.value)
    with pytest.raises(DataError, match="no file"):
        check_inputs([])
    assert check_inputs([str(good)]) == good.stat().st_size


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
