"""Counts, pictures and samples of a dataset; damage of any kind is found."""

import json
from pathlib import Path

import corpus
import numpy as np
import pytest

from megatron.data import inspection, manifest
from megatron.data.errors import DataError
from megatron.data.index_file import read_index
from megatron.data.inspection import inspect, plot, samples, text_of, verify
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer


@pytest.fixture
def prefix(tmp_path) -> str:
    path = corpus.write_jsonl(tmp_path / "in.jsonl", [*corpus.english(100), "", *corpus.NASTY])
    return preprocess([str(path)], str(tmp_path / "out"), corpus.gpt2(tmp_path), append_eod=True, workers=0).prefixes[0]


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_counts(chunk, prefix, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    index = read_index(prefix)
    lengths = index.document_lengths(0, index.documents)
    report = inspect(prefix)
    assert (report.documents, report.tokens, report.empty_documents) == (
        len(lengths),
        lengths.sum(),
        (lengths == 0).sum(),
    )
    assert (report.shortest, report.longest) == (0, lengths.max())
    assert report.median == np.median(lengths)
    assert report.mean == pytest.approx(lengths.mean())
    for bound, count in report.histogram:
        assert count == ((lengths < bound) & (lengths >= bound // 2)).sum()
    assert sum(count for _, count in report.histogram) == len(lengths)
    shown = text_of(report, manifest.read(prefix))
    assert f"{report.documents:,} documents" in shown
    assert "GPT2BPETokenizer" in shown
    assert verify(prefix) == ([], [])


def test_median_between_two_classes(tmp_path):
    path = corpus.write_jsonl(tmp_path / "in.jsonl", ["a", "a", "a" * 100, "a" * 100])
    data = corpus.byte_level(tmp_path)
    prefix = preprocess([str(path)], str(tmp_path / "out"), data, workers=0).prefixes[0]
    assert inspect(prefix).median == 50.5


def test_samples_and_picture(prefix, tmp_path):
    tokenizer = build_tokenizer(corpus.gpt2(tmp_path))
    texts = [*corpus.english(100), "", *corpus.NASTY]
    shown = dict(samples(prefix, tokenizer, 10**6, seed=1))
    assert sorted(shown) == list(range(len(texts)))
    for number, text in shown.items():
        assert (text + tokenizer.decode([tokenizer.eod])).startswith(
            tokenizer.decode(tokenizer.encode(texts[number])[:200])
        )
    pytest.importorskip("matplotlib")
    plot(inspect(prefix), str(tmp_path / "lengths.png"))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def flip(path: str, place: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)


@pytest.mark.parametrize("place", [40, -20])
def test_damage_is_not_counted(place, prefix):
    flip(f"{prefix}.idx", place)
    with pytest.raises(DataError, match=r"the \.idx is damaged"):
        inspect(prefix)


def test_a_kind_of_picture_that_is_not_known(prefix, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=r"--plot .*supported formats: .*png"):
        plot(inspect(prefix), str(tmp_path / "lengths.foo"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda prefix: flip(f"{prefix}.bin", 100), "SHA-256"),
        (lambda prefix: flip(f"{prefix}.idx", 40), "the .idx is damaged between sequences"),
        (lambda prefix: flip(f"{prefix}.idx", -20), "its documents do not end where its sequences do"),
        (lambda prefix: flip(f"{prefix}.idx", 0), "is no index of a dataset"),
        (lambda prefix: Path(f"{prefix}.bin").write_bytes(b"12"), "the .bin has 2 bytes"),
        (lambda prefix: Path(f"{prefix}.json").write_text("{"), "is no manifest"),
        (lambda prefix: Path(prefix).with_name("in.jsonl").write_text("{}"), "has 2 bytes now"),
        (lambda prefix: flip(str(Path(prefix).with_name("in.jsonl")), 9), "has other content than when"),
    ],
)
def test_damage_is_found(damage, words, prefix):
    damage(prefix)
    problems, _ = verify(prefix)
    assert any(words in problem for problem in problems), problems


def test_what_the_manifest_says_is_compared(prefix, tmp_path):
    facts = json.loads(Path(f"{prefix}.json").read_text())
    (other,) = verify(prefix, build_tokenizer(corpus.byte_level(tmp_path)))[0]
    assert "the tokenizer given is ByteTokenizer" in other
    Path(f"{prefix}.json").write_text(
        json.dumps(facts | {"documents": 1, "tokenizer": facts["tokenizer"] | {"vocab_size": 9}})
    )
    problems, _ = verify(prefix)
    assert "documents: the manifest says 1" in problems[0]
    assert "is outside of the vocabulary, which ends at 8" in problems[1]
    Path(prefix).with_name("in.jsonl").unlink()
    Path(f"{prefix}.json").write_text(json.dumps(facts))
    problems, (remark,) = verify(prefix)
    assert (problems, "it is not there" in remark) == ([], True)
    Path(f"{prefix}.json").unlink()
    problems, (remark,) = verify(prefix)
    assert (problems, "there is no manifest" in remark) == ([], True)
