"""What is removed from a corpus, and that everything else stays as it was."""

import itertools
import json
import os
import random
import sys
from pathlib import Path

import corpus
import pytest
import zstandard

from megatron.data import cleaning
from megatron.data.cleaning import Filters, clean
from megatron.data.errors import DataError
from megatron.data.journal import Journal
from megatron.data.reading import read_batches


def run(folder: Path, texts: list[str], name="out", **options):
    path = corpus.write_jsonl(folder / "in.jsonl", texts)
    return clean([str(path)], str(folder / name), **{"workers": 0} | options)


def kept(done) -> list[str]:
    parts = [zstandard.decompress(Path(path).read_bytes(), 10**8) for path in done.files]
    return [json.loads(line)["text"] for part in parts for line in part.splitlines()]


def removed(folder: Path, name="out") -> list[tuple[int, str]]:
    lines = (folder / f"{name}.removed.jsonl").read_text().splitlines()
    return [(entry["line"], entry["reason"]) for entry in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("filters", "text", "reason"),
    [
        (Filters(min_characters=5), "abcd", "too short"),
        (Filters(max_characters=3), "abcd", "too long"),
        (Filters(min_alphanumeric=0.6), "ab -- !", "too few letters and digits"),
        (Filters(max_repeated_lines=0.3), "menu\n\nmenu\nmenu \ntext", "repeated lines"),
        (Filters(max_compression=5), "buy now " * 100, "repetitive: compresses too well"),
    ],
)
def test_filters(filters, text, reason):
    assert filters.reason(text) == reason
    if filters.max_characters is None:
        for good in ("Prose, in a line.\n\nAnd another", "日本語のテキスト。", corpus.english(1)[0]):
            assert filters.reason(good) is None
    assert Filters().reason(text) is None


def test_everything_else_stays_as_it_was(tmp_path):
    texts = [*corpus.english(50), *corpus.NASTY]
    done = run(tmp_path, texts, part_bytes=4000)
    assert len(done.files) > 3
    assert kept(done) == texts
    assert (done.documents, done.kept, dict(done.removed)) == (len(texts), len(texts), {})
    content = b"".join(zstandard.decompress(Path(path).read_bytes(), 10**8) for path in done.files)
    assert content == (tmp_path / "in.jsonl").read_bytes()  # other fields and the way of writing too


def test_exact_duplicates_and_broken_lines(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{\n{"text": "b"}\n\n{"id": 1, "text": "\\u0061"}\n{"text": "A"}')
    done = clean([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), exact=True, workers=0)
    assert kept(done) == ["a", "b", "A"]
    (first, broken), (second, exact) = removed(tmp_path)
    assert (first, second, exact) == (2, 5, "exact duplicate")
    assert broken.startswith("broken: not JSON")
    report = json.loads((tmp_path / "out.cleaning.json").read_text())
    assert (report["documents"], report["kept"]) == (5, 3)
    assert report["removed"] == {"broken": 1, "exact duplicate": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_near_duplicates(workers, tmp_path):
    """Compared with the similarity counted from the texts themselves."""
    pytest.importorskip("rensa")
    draw = random.Random(1)
    texts, expected = [], []
    for number, text in enumerate(corpus.english(60, words=300)):
        words = text.split()
        texts.append(text)
        if number % 3 == 0 and len(words) > 100:
            changed = list(words)
            for _ in range(1 if number % 2 else 40):
                changed[draw.randrange(len(words))] = "changed"
            texts.append(" ".join(changed))

    def runs(text: str) -> set:
        words = text.lower().replace(".", "").split()
        return {tuple(words[start : start + 5]) for start in range(max(len(words) - 4, 1))}

    doubtful, seen = set(), []
    for number, text in enumerate(texts):
        nearest = max((len(runs(text) & other) / len(runs(text) | other) for other in seen), default=0)
        seen.append(runs(text))
        if 0.7 < nearest < 0.9:
            doubtful.add(number)
        elif nearest >= 0.9:
            expected.append(number)
    done = run(tmp_path, texts, near=0.8, workers=workers)
    found = [line - 1 for line, reason in removed(tmp_path) if reason == "near duplicate"]
    assert [number for number in found if number not in doubtful] == expected
    assert len(expected) > 5
    assert kept(done) == [text for number, text in enumerate(texts) if number not in found]


def test_against_other_documents(tmp_path):
    pytest.importorskip("rensa")
    held_out, texts = corpus.english(5, seed=1, words=200), corpus.english(5, seed=2, words=200)
    path = corpus.write_jsonl(tmp_path / "held_out.jsonl.gz", held_out)
    long = max(held_out, key=len)
    done = run(tmp_path, [*texts, held_out[2], long + " more"], exact=True, near=0.8, against=[str(path)])
    assert kept(done) == texts
    assert [reason for _, reason in removed(tmp_path)] == ["exact duplicate", "near duplicate"]
    with pytest.raises(DataError, match="--against takes"):
        run(tmp_path, texts, name="other", against=[str(path)])


def test_chinese_and_tiny_texts_are_not_all_alike(tmp_path):
    pytest.importorskip("rensa")
    texts = [
        "今天天气很好我们去公园",
        "昨天下雨了所以没有出门",
        "a",
        "b",
        "one two",
        "one three",
        "",
        "今天天气很好我们去公园!",
    ]
    done = run(tmp_path, texts, near=0.8)
    assert kept(done) == texts[:-1]


def test_errors_leave_nothing(tmp_path):
    wrong = {"--near-duplicates 1.5": {"near": 1.5}, "not one of 2 documents": {"filters": Filters(min_characters=10)}}
    for words, options in wrong.items():
        with pytest.raises(DataError, match=words):
            run(tmp_path, ["a", "b"], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    run(tmp_path, ["a", "b"])
    with pytest.raises(DataError, match=r"out-00000.*--overwrite"):
        run(tmp_path, ["c"])
    assert kept(run(tmp_path, ["c"], overwrite=True)) == ["c"]


@pytest.mark.parametrize("near", [None, 0.8])
def test_a_stopped_run_goes_on_after_its_full_files(near, tmp_path, monkeypatch):
    """With what was seen before, in --against too, and without reading anything twice."""
    if near:
        pytest.importorskip("rensa")
    held_out = corpus.write_jsonl(tmp_path / "held_out.jsonl", corpus.english(3, seed=1, words=60))
    texts = corpus.english(100, words=60)
    texts += [*corpus.english(3, seed=1, words=60), *texts[:50], *(text + " more" for text in texts[:50] if near), "{"]
    path = corpus.write_jsonl(tmp_path / "in.jsonl", texts)
    options = {"exact": True, "near": near, "against": [str(held_out)], "part_bytes": 5000, "workers": 0}
    whole = clean([str(path)], str(tmp_path / "whole"), **options)
    starts = []

    def until(most):
        def read(spans, *args, **others):
            if "start" in others:
                starts.append(others["start"].offset)
            for number, batch in enumerate(read_batches(spans, *args, **others)):
                if "start" in others and number == most:
                    raise OSError(28, "No space left on device")
                yield batch

        return read

    for most in (2, 1, 3):
        monkeypatch.setattr(cleaning, "read_batches", until(most))
        with pytest.raises(OSError, match="No space"):
            clean([str(path)], str(tmp_path / "out"), **options)
        (tmp_path / "out-00099.incomplete.jsonl.zst").write_bytes(b"of a later point")
        with open(tmp_path / "out.incomplete.seen", "ab") as file:
            file.write(b"of a later point")
    with pytest.raises(DataError, match=r"another one: it differs in filters\..*--overwrite"):
        clean([str(path)], str(tmp_path / "out"), filters=Filters(min_characters=9), **options)
    monkeypatch.setattr(cleaning, "read_batches", until(10**9))
    done = clean([str(path)], str(tmp_path / "out"), **options)
    assert starts == sorted(set(starts))
    assert starts[0] == 0 < len(starts) - 1
    assert (done.documents, done.kept, done.removed) == (whole.documents, whole.kept, whole.removed)
    assert len(done.files) == len(whole.files) > 3
    for one, other in zip(done.files, whole.files, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()
    for name in ("removed.jsonl", "cleaning.json"):
        assert (tmp_path / f"out.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    assert not list(tmp_path.glob("*incomplete*"))


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_interrupted_between_the_final_names(renamed, tmp_path, monkeypatch):
    """Also where old output is replaced: nothing of the new is lost, nothing of the old is left."""
    run(tmp_path, corpus.english(50, seed=1), part_bytes=1000)
    texts = corpus.english(9)
    corpus.write_jsonl(tmp_path / "in.jsonl", texts)
    replace, count = os.replace, itertools.count(1)

    def fail(source, target):
        if not str(source).endswith(".new") and next(count) > renamed:
            raise OSError(5, "Input/output error")
        replace(source, target)

    options = {"overwrite": True, "part_bytes": 1000, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            clean([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **options)
    monkeypatch.setattr(cleaning, "read_batches", None)
    done = clean([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **options)
    assert kept(done) == texts
    assert done.documents == done.kept == 9
    names = [Path(file).name for file in done.files]
    assert sorted(path.name for path in tmp_path.glob("out*")) == [*names, "out.cleaning.json", "out.removed.jsonl"]


def test_what_a_killed_run_left_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "out-00000.incomplete.jsonl.zst").write_bytes(b"half a file")
    path = corpus.write_jsonl(tmp_path / "in.jsonl", ["a", "b"])
    with open(path, "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        done = clean(["-"], str(tmp_path / "out"), workers=0)
    assert "standard input, which cannot be read again from where it was: starting over" in capsys.readouterr().err
    assert kept(done) == ["a", "b"]
    with pytest.raises(DataError, match="exist already"):  # it may be other text now
        clean(["-"], str(tmp_path / "out"), workers=0)
    (tmp_path / "new-00000.incomplete.jsonl.zst").write_bytes(b"half a file")
    clean([str(path)], str(tmp_path / "new"), workers=0)
    assert "stopped before its first file was full: starting over" in capsys.readouterr().err


def test_two_runs_at_the_same_time(tmp_path):
    with Journal(f"{tmp_path}/out.cleaning", {}, False), pytest.raises(DataError, match="another process is writing"):
        run(tmp_path, ["a"])
    assert kept(run(tmp_path, ["a"])) == ["a"]


def test_names_that_are_no_utf_8(tmp_path):
    """Lists and reports stay JSON, from which Python reads the very name."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    Path(path).write_text('{"text": "a"}\n{\n')
    done = clean([path], str(tmp_path / "out"), workers=0)
    assert kept(done) == ["a"]
    (entry,) = map(json.loads, (tmp_path / "out.removed.jsonl").read_text(encoding="utf-8").splitlines())
    assert entry["file"] == path
    assert json.loads((tmp_path / "out.cleaning.json").read_text(encoding="utf-8"))["inputs"] == [path]
