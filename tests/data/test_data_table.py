"""The table of a run's data, compared with the data that it then reads."""

import numpy as np
import pytest
import tiny_run

from megatron.config import RunConfig
from megatron.config.run import build
from megatron.data.data_table import data_table, planned_data_table
from megatron.data.dataset_checks import count_tokens
from megatron.data.gpt_dataset import ResumedData, build_datasets
from megatron.data.index_file import read_index
from megatron.data.tokenizer import build_tokenizer

SEQ = 32


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two datasets, and the tokenizer beside the first."""
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    tiny_run.make_tokenizer(folders[0])
    return [str(tiny_run.make_dataset(folder, documents)) for folder, documents in zip(folders, (200, 50), strict=True)]


def run_of(corpora: list[str], tmp_path, **values) -> RunConfig:
    tokenizer = {"tokenizer_type": "HFTokenizer", "tokenizer_model": corpora[0].replace("text", "tokenizer.json")}
    cache = {"data_cache_path": str(tmp_path / "cache")}
    return build({"seq_length": SEQ, "global_batch_size": 16, "eval_iters": 2, **tokenizer, **cache, **values})


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[1:]]


def test_a_split_corpus(corpora, tmp_path):
    config = run_of(corpora, tmp_path, data_path=(corpora[0],), split="80,15,5")
    lengths = read_index(corpora[0]).lengths
    expected = []
    for bounds, read in (((0, 160), 640), ((160, 190), 32), ((190, 200), 32)):
        tokens = int(np.sum(lengths[slice(*bounds)]))
        sequences = (tokens - 1) // SEQ
        numbers = [str(bounds[1] - bounds[0]), f"{tokens:,}", str(sequences), "100.0%", str(read)]
        expected.append([corpora[0], *numbers, f"{read / sequences:.2f}"])
    text = data_table(config, 640)
    training, first, validation, second, test, third = rows(text)
    assert [first, second, third] == expected
    assert [" ".join(row) for row in (training, validation, test)] == [
        "training", "validation, every 100 updates", "test, at the end of training",
    ]  # fmt: skip
    assert len({len(line) for line in text.splitlines() if line.startswith("  ")}) == 1
    config.training.eval_interval = 0
    assert rows(data_table(config, 640))[2] == ["no", "validation"]


def test_a_blend_and_named_sets(corpora, tmp_path):
    a, b = corpora
    sets = {"valid_data_path": (f"books={b}", a), "test_data_path": ("1", a, "3", b)}
    config = run_of(corpora, tmp_path, train_data_path=(a, b), **sets)
    _, *training, _, books, text, _, first, second = rows(data_table(config, 100))
    tokens = [count_tokens(prefix) for prefix in corpora]
    shares = [count / sum(tokens) for count in tokens]
    assert [row[4] for row in training] == [f"{share:.1%}" for share in shares]
    assert [row[5] for row in training] == [f"{100 * share:.0f}" for share in shares]
    built = build_datasets(config, build_tokenizer(config.data), (100, 32, 32))
    assert sorted(built.train.counts()) == sorted(int(row[5]) for row in training)
    assert (books[:2], text[:2]) == (["books:", b], ["text:", a])
    assert [row[4:6] for row in (first, second)] == [["25.0%", "8"], ["75.0%", "24"]]


def test_a_changed_blend_counts_what_was_read_before(corpora, tmp_path):
    a, b = corpora
    config = run_of(corpora, tmp_path, train_data_path=(a,), change_blend=True)
    tokenizer = build_tokenizer(config.data)
    begun = build_datasets(config, tokenizer, (60, 0, 0)).state
    config.data.train_data_path = ("1", a, "3", b)
    state = build_datasets(config, tokenizer, (100, 0, 0), ResumedData(begun, 60)).state
    read = {row[0]: row[5] for row in rows(data_table(config, 100, state)) if row[0] in corpora}
    assert read == {a: "70", b: "30"}


def test_a_plan_without_the_data(corpora, tmp_path):
    config = run_of(corpora, tmp_path, data_path=("1", corpora[0], "1", "elsewhere"))
    assert planned_data_table(config, 10) == "data: not looked at, since there is no elsewhere.idx, elsewhere.bin"
    config.data.data_path = (corpora[0],)
    assert planned_data_table(config, 10) == data_table(config, 10)


def test_corpora_are_in_the_order_of_the_command_line(corpora, tmp_path):
    """Checkpoints have them in an order of their own."""
    for given in (corpora, corpora[::-1]):
        config = run_of(corpora, tmp_path, train_data_path=tuple(given))
        state = build_datasets(config, build_tokenizer(config.data), (100, 0, 0)).state
        text = data_table(config, 100, state)
        assert [row[0] for row in rows(text) if row[0] in corpora] == given
        assert text == data_table(config, 100)
