"""What is removed from a corpus, and that everything else stays as it was."""

import json
import random
from pathlib import Path

import corpus
import pytest
import zstandard

from megatron.data.cleaning import Filters, clean
from megatron.data.errors import DataError


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
