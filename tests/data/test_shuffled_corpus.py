"""The order in which a run reads one corpus."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.index_file import write_index
from megatron.data.shuffled_corpus import ShuffledCorpus

SEQ, VOCABULARY = 8, 60_000


def make(folder: Path, lengths: list[int]) -> str:
    """A dataset whose tokens count up from 0, so that each says where it stands."""
    prefix = str(folder / "counting")
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, np.dtype(np.uint16), np.array(lengths, np.int32), np.arange(1, len(lengths) + 1))
    np.arange(sum(lengths), dtype=np.uint16).tofile(f"{prefix}.bin")
    return prefix


def open_corpus(folder: Path, lengths: list[int], **changes) -> ShuffledCorpus:
    values = {
        "prefix": make(folder, lengths), "content": "c", "first": 0, "last": len(lengths), "tokens": sum(lengths),
        "seq_length": SEQ, "seed": 1, "vocab_size": VOCABULARY, "cache": str(folder / "cache"),
    }  # fmt: skip
    return ShuffledCorpus(**(values | changes))


def read(corpus: ShuffledCorpus, start: int, end: int) -> np.ndarray:
    corpus.prepare(start, end)
    return np.stack([corpus[index] for index in range(start, end)])


LENGTHS = [int(length) for length in np.random.default_rng(0).integers(0, 30, 50)]


def test_an_epoch_reads_every_token_once_but_for_a_rest(tmp_path):
    corpus = open_corpus(tmp_path, LENGTHS)
    count = corpus.sequences
    assert count == (sum(LENGTHS) - 1) // SEQ
    left_out = set(range(sum(LENGTHS)))
    for epoch in range(3):
        labels = read(corpus, epoch * count, (epoch + 1) * count)[:, 1:].flatten().tolist()
        assert len(set(labels)) == len(labels) == count * SEQ, "no token twice"
        left_out &= set(range(sum(LENGTHS))) - set(labels)
    assert not left_out, "what one epoch leaves out another reads"


def test_documents_are_whole_and_sequences_follow_each_other(tmp_path):
    """Put back into the order of the text, each sequence begins with the token that ends another."""
    corpus = open_corpus(tmp_path, LENGTHS)
    sequences = read(corpus, 0, corpus.sequences)
    by_first = {int(sequence[0]): sequence for sequence in sequences}
    ends = set(itertools.accumulate(LENGTHS))
    followed = 0
    for sequence in sequences:
        breaks = [int(a) + 1 for a, b in itertools.pairwise(sequence) if b != a + 1]
        assert set(breaks) <= ends, "the text goes on elsewhere only where a document ends"
        followed += int(sequence[-1]) in by_first
    assert followed == len(sequences) - 1


def test_a_longer_run_begins_with_a_shorter_one(tmp_path):
    short = read(open_corpus(tmp_path, LENGTHS), 0, 20)
    long = read(open_corpus(tmp_path, LENGTHS, cache=str(tmp_path / "other")), 0, 1000)
    np.testing.assert_array_equal(long[:20], short)


def test_seed_content_and_epoch_decide_about_the_order(tmp_path):
    count = open_corpus(tmp_path, LENGTHS).sequences
    orders = [read(open_corpus(tmp_path, LENGTHS), start, start + count) for start in (0, count)]
    orders += [read(open_corpus(tmp_path, LENGTHS, **change), 0, count) for change in ({"seed": 2}, {"content": "d"})]
    for one, other in itertools.combinations(orders, 2):
        assert not np.array_equal(one, other)


def test_the_order_never_changes(tmp_path):
    """Runs of years ago are resumed with caches that are long gone."""
    sequences = read(open_corpus(tmp_path, [5, 9, 0, 20, 3, 7, 11]), 0, 12)
    assert sequences[:, 0].tolist() == [21, 43, 54, 36, 46, 12, 25, 46, 54, 33, 17, 12]


def test_documents_beyond_the_split_are_not_read(tmp_path):
    first, last = 10, 30
    begin, end = sum(LENGTHS[:first]), sum(LENGTHS[:last])
    corpus = open_corpus(tmp_path, LENGTHS, first=first, last=last, tokens=end - begin)
    tokens = read(corpus, 0, 3 * corpus.sequences)
    assert begin <= tokens.min()
    assert tokens.max() < end


def test_only_what_is_missing_is_computed(tmp_path):
    corpus = open_corpus(tmp_path, [50_000] * 1, seq_length=1)  # an epoch is most of a file
    read(corpus, 0, 3)
    (folder,) = tmp_path.glob("cache")
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    per_file = corpus.sequences * 2
    corpus.prepare(per_file, per_file + 1)
    assert len(list(folder.glob("*.npy"))) == 4
    assert {path: path.stat().st_mtime_ns for path in first} == first
    with pytest.raises(DataError, match="50000 tokens 2000 times, expected 1000 at most"):
        corpus.prepare(0, corpus.sequences * 2000)


def test_a_pickled_corpus_is_small(tmp_path):
    corpus = open_corpus(tmp_path, LENGTHS)
    expected = read(corpus, 0, 30)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    np.testing.assert_array_equal([pickle.loads(pickled)[index] for index in range(30)], expected)


def test_tokens_beyond_the_vocabulary_never_get_out(tmp_path):
    corpus = open_corpus(tmp_path, [100], vocab_size=99)
    corpus.prepare(0, corpus.sequences)
    with pytest.raises(DataError, match=r"holds token 99 .*expected 0 to 98; the .bin has changed"):
        [corpus[index] for index in range(10 * corpus.sequences)]


def test_a_cache_that_other_nodes_do_not_see(tmp_path):
    with pytest.raises(DataError, match="a file system that all nodes share"):
        open_corpus(tmp_path, LENGTHS)[0]
