"""Reading records: any format and compression, from anywhere on, and damage is noticed."""

import gzip
import random

import corpus
import pytest
import zstandard

from megatron.data import reading
from megatron.data.errors import DataError
from megatron.data.inputs import spans_of
from megatron.data.jsonl import record_texts
from megatron.data.reading import lines_before, read_batches


def spans(*paths):
    return spans_of([str(path) for path in paths])


def lines_of(*paths, batch_bytes=1000):
    return [line for batch in read_batches(spans(*paths), batch_bytes=batch_bytes) for line in batch.records]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_lines_and_their_numbers(suffix, tmp_path):
    texts = corpus.english(60) + corpus.NASTY
    plain = corpus.write_jsonl(tmp_path / "plain", texts).read_bytes().splitlines(keepends=True)
    path = corpus.write_jsonl(tmp_path / f"file{suffix}", texts)
    for batch_bytes in (1, 1000, 10**9):
        number = 1
        for batch in read_batches(spans(path), batch_bytes=batch_bytes):
            assert batch.first == number
            assert batch.records == plain[number - 1 : number - 1 + len(batch.records)]
            assert 0 < batch.consumed <= path.stat().st_size
            number += len(batch.records)
        assert number == len(plain) + 1
        assert batch.consumed == path.stat().st_size


def test_several_files_count_their_own_lines(tmp_path):
    paths = [corpus.write_jsonl(tmp_path / name, corpus.english(5)) for name in ("a.jsonl", "b.jsonl.gz")]
    batches = list(read_batches(spans(*paths)))
    assert [(batch.span.path, batch.first, len(batch.records)) for batch in batches] == [
        (str(paths[0]), 1, 5),
        (str(paths[1]), 1, 5),
    ]
    assert batches[-1].consumed == sum(path.stat().st_size for path in paths)


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


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.jsonl.zst", "f.txt", "f.parquet"])
def test_reading_goes_on_from_any_batch(name, tmp_path):
    path, texts = tmp_path / name, corpus.english(700, words=10)
    if name == "f.parquet":
        corpus.write_parquet(path, {"text": texts}, row_group_size=300)
    elif name == "f.txt":
        path.write_text("".join(texts))
    else:
        corpus.write_jsonl(path, texts)
    last = corpus.write_jsonl(tmp_path / "last.jsonl", ["end"])
    options = {"text_documents": "line", "batch_bytes": 3000}
    batches = list(read_batches(spans(path, last), **options))
    assert len(batches) > 3
    everything = [record for batch in batches for record in batch.records]
    assert len(everything) == 701
    done = 0
    for batch in batches:
        done += len(batch.records)
        rest = list(read_batches(spans(path, last), start=batch.end, **options))
        assert [record for other in rest for record in other.records] == everything[done:]
        assert not rest or rest[0].first in (batch.end.records + 1, 1)
        assert batch.end.records == batch.first - 1 + len(batch.records)


def test_a_text_file_is_one_document_or_one_a_line(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\r\n\r\ntwo"))
    (whole,) = read_batches(spans(path))
    assert (whole.kind, whole.records) == ("whole", [b"one\r\n\r\ntwo"])
    assert list(read_batches(spans(path), start=whole.end)) == []
    (lines,) = read_batches(spans(path), text_documents="line")
    assert (lines.kind, lines.records) == ("line", [b"one\r\n", b"\r\n", b"two"])


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    corpus.write_parquet(path, {"text": ["a", None, "c"], "id": ["1", "2", "3"]})
    (batch,) = read_batches(spans(path), ("id", "text"))
    assert batch.records[:2] == [{"id": "1", "text": "a"}, {"id": "2", "text": None}]
    with pytest.raises(DataError, match=r"a\.parquet has no column body; its columns: text, id"):
        list(read_batches(spans(path), ("body",)))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a\.parquet is no Parquet file, or a damaged one"):
        list(read_batches(spans(path)))


def test_damaged_pages_of_a_parquet_file_are_an_error_that_names_it(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    for compression in ("snappy", "zstd", "gzip", "none"):  # the last one by its checksum
        table = pyarrow.table({"text": corpus.english(50)})
        parquet.write_table(
            table, path, compression=compression, use_dictionary=False, write_page_checksum=compression == "none"
        )
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 40] = b"x" * 40
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is no Parquet file, or a damaged one"):
            list(read_batches(spans(path)))


def test_a_text_in_parquet_that_is_no_utf_8_breaks_its_row_only(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for text, raw in ((pyarrow.string(), pyarrow.binary()), (pyarrow.large_string(), pyarrow.large_binary())):
        buffers = pyarrow.array([b"ok", b"\xff", None, "ä".encode()], raw).buffers()
        column = pyarrow.Array.from_buffers(text, 4, buffers)  # which nobody has checked
        path = corpus.write_parquet(tmp_path / "a.parquet", {"text": column})
        (batch,) = read_batches(spans(path))
        assert [record["text"] for record in batch.records] == ["ok", b"\xff", None, "ä"]
        with pytest.raises(DataError, match="'text' is bytes, expected a string in UTF-8"):
            record_texts(batch.records[1], batch.kind, ("text",))


def test_a_parquet_column_that_is_there_twice(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    with pytest.raises(DataError, match="more than one column text"):
        list(read_batches(spans(path)))


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 40])
def test_shards_are_all_records_once_and_in_order(shards, tmp_path):
    """Stretches of plain files, however long a line is; compressed ones whole."""
    plain = corpus.write_jsonl(tmp_path / "a.jsonl", [*corpus.english(30, words=10), "x" * 5000, *corpus.english(5)])
    packed = corpus.write_jsonl(tmp_path / "b.jsonl.zst", corpus.english(20))
    empty = corpus.write_jsonl(tmp_path / "c.jsonl", [])
    last = corpus.write_jsonl(tmp_path / "d.jsonl", corpus.english(10))
    paths = [str(path) for path in (plain, packed, empty, last)]
    everything = lines_of(*paths)
    seen = []
    for index in range(shards):
        for span in spans_of(paths, shards, index):
            before = lines_before(span)
            for batch in read_batches([span], batch_bytes=500):
                seen += batch.records
                if span.path == str(plain):
                    assert everything[before + batch.first - 1] == batch.records[0]
    assert seen == everything


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 40])
def test_parquet_files_are_cut_between_groups_of_rows(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_ROWS", 4)
    texts = [str(number) * (number % 50) for number in range(300)]
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c.parquet")]
    for path, part in zip(paths, (texts[:200], [], texts[200:]), strict=True):
        corpus.write_parquet(path, {"id": list(range(len(part))), "text": part}, row_group_size=9)
    seen, busy = [], 0
    for index in range(shards):
        before = len(seen)
        for span in spans_of(paths, shards, index):
            batches = list(read_batches([span]))
            rows = [record["text"] for batch in batches for record in batch.records]
            first = lines_before(span) + (200 if span.path == paths[2] else 0)
            assert rows == texts[first : first + len(rows)]
            for batch in batches:
                rest = [record["text"] for other in read_batches([span], start=batch.end) for record in other.records]
                assert rest == rows[batch.end.records :]
                assert batch.consumed <= span.end - span.start
            seen += rows
        busy += len(seen) > before
    assert seen == texts
    assert busy >= min(shards, 15)


def test_no_more_of_a_parquet_file_is_in_memory_than_a_few_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    draw = random.Random(0)
    texts = [draw.randbytes(10_000).hex() for _ in range(800)]
    path = corpus.write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=20)
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in read_batches(spans(path)):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < path.stat().st_size / 4
