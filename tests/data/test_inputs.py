"""Which files a corpus consists of."""

import hashlib
import os

import corpus
import pytest

from megatron.data.errors import DataError
from megatron.data.inputs import Checksums, empty_shards, find_inputs, format_of, spans_of


def test_files_patterns_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.jsonl.gz",
        "b/1.txt",
        "b/.hidden.jsonl",
        "b/c/0.parquet",
        "b/notes.md",
        "x2.jsonl",
        "x1.jsonl",
        "odd",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert find_inputs(["odd", "x*.jsonl", "b"]) == [
        "odd", "x1.jsonl", "x2.jsonl", "b/1.txt", "b/2.jsonl.gz", "b/c/0.parquet",
    ]  # fmt: skip
    assert find_inputs(["b/**/*.parquet"]) == ["b/c/0.parquet"]
    assert find_inputs(["-"]) == ["-"]
    formats = [format_of(name) for name in ("a.txt.zst", "a.parquet", "a.jsonl.gz", "a")]
    assert formats == [".txt", ".parquet", ".jsonl", ".jsonl"]


def test_everything_wrong_is_told_at_once(tmp_path):
    good = corpus.write_jsonl(tmp_path / "good.jsonl", ["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.jsonl").symlink_to(good)
    words = [str(good), str(tmp_path / "link.jsonl"), str(tmp_path / "empty"), "/no/such/file", "/no/such/*", "-"]
    with pytest.raises(DataError) as error:
        find_inputs(words)
    for part in (
        "good.jsonl is given more than once", "is a folder without any file", "/no/such/file: there is no such file",
        "/no/such/*: no file fits", "is given beside files",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(DataError, match="no file is given"):
        find_inputs([])


def test_links(tmp_path):
    """Those to a folder are followed, but not in circles; those that lead nowhere are told, not left out."""
    for name in ("in/a.jsonl", "in/b/c.jsonl", "elsewhere/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "in" / "b" / "up").symlink_to("../../in")
    (tmp_path / "in" / "z").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../elsewhere")
    folder = str(tmp_path / "in")
    assert find_inputs([folder]) == [f"{folder}/{name}" for name in ("a.jsonl", "b/c.jsonl", "z/d.jsonl")]
    (tmp_path / "in" / "gone.jsonl").symlink_to("nowhere")
    for word in (folder, f"{folder}/*.jsonl"):
        with pytest.raises(DataError, match=r"gone\.jsonl: a link that leads nowhere"):
            find_inputs([word])


def test_files_that_cannot_be_read_twice_or_were_cut_off(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("a.jsonl.gz", "b.zst", "c.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.setattr("sys.stdin", None)
    for words, told in (
        ([str(tmp_path / "pipe.jsonl")], "no regular file, .* pipe it into --input -"),
        ([str(tmp_path / "a*")], "a.jsonl.gz: it has 0 bytes"),
        ([str(tmp_path / "b.zst")], "b.zst: it has 0 bytes"),
        (["-"], "standard input is closed"),
    ):
        with pytest.raises(DataError, match=told):
            find_inputs(words)
    assert find_inputs([str(tmp_path / "c.jsonl")])


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    corpus.write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        find_inputs([str(tmp_path)])


def test_what_the_tools_write_beside_their_input_is_no_input(tmp_path, capsys):
    path = corpus.write_jsonl(tmp_path / "a.jsonl", ["x"])
    output = ["o_text_document.json", "o.rejected.jsonl", "o.incomplete.rejected.jsonl", "c-00000.incomplete.jsonl.zst"]
    output += ["c.removed.jsonl", "c.cleaning.json", "index-cache/description.txt"]
    (tmp_path / "index-cache").mkdir()
    for name in [*output, "o_text_document.bin"]:
        (tmp_path / name).write_text("{}")
    assert find_inputs([str(tmp_path)]) == [str(path)]
    assert "left out, as these tools wrote them: " in capsys.readouterr().err
    assert find_inputs([f"{tmp_path}/*.jsonl"]) == [str(path)]
    named = str(tmp_path / "o.rejected.jsonl")
    assert find_inputs([named]) == [named]


def test_shards_that_cannot_be(tmp_path):
    path = str(corpus.write_jsonl(tmp_path / "a.jsonl", ["x"]))
    for count, index in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(DataError, match=f"--shard-index {index} of --num-shards {count}"):
            spans_of([path], count, index)
    with pytest.raises(DataError, match="standard input cannot be cut"):
        spans_of(["-"], 2, 0)


def test_whole_files_are_spread_by_their_sizes(tmp_path):
    def shards(sizes, count):
        paths = [tmp_path / f"{number}.jsonl.zst" for number in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            path.write_bytes(bytes(size))
        paths = [str(path) for path in paths]
        found = [[span.size for span in spans_of(paths, count, index)] for index in range(count)]
        return found, empty_shards(paths, count)

    assert shards([1000, 1000, 3000, 1000], 2) == ([[1000, 1000], [3000, 1000]], None)
    assert shards([100] * 4, 4) == ([[100]] * 4, None)
    found, note = shards([100, 100], 5)
    assert sorted(found, key=len) == [[], [], [], [100], [100]]
    assert "there are 2 files" in note
    assert "at least 3 shards are empty" in note
    plain = str(corpus.write_jsonl(tmp_path / "a.jsonl", ["x"]))
    assert empty_shards([plain], 5) is None


def test_checksums(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(os.urandom(100_000))
    spans = [span for index in range(2) for span in spans_of([str(path)], 2, index)]
    data = path.read_bytes()
    assert Checksums(spans).result() == [hashlib.sha256(part).hexdigest() for part in (data[:50_000], data[50_000:])]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Checksums(spans).result()
