"""Datasets of a run: what is in them, in which order, and what is refused before the first step."""

import dataclasses
import json
import logging
import pickle
import warnings
from pathlib import Path

import corpus
import numpy as np
import pytest
import torch

from megatron.config import DataConfig, RunConfig
from megatron.data import dataset_checks
from megatron.data.errors import DataError
from megatron.data.gpt_dataset import ResumedData, batches, build_datasets
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer

SEQ = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """Datasets a, b and c of different sizes, and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = corpus.gpt2(folder)
    for name, documents in (("a", 60), ("b", 30), ("c", 200)):
        path = corpus.write_jsonl(folder / f"{name}.jsonl", corpus.english(documents, seed=documents, words=20))
        preprocess([str(path)], str(folder / name), tokenizer, append_eod=True, workers=0)
    return tokenizer


@pytest.fixture
def config(data, tmp_path) -> RunConfig:
    """A run on dataset a with its own cache."""
    run = RunConfig(data=dataclasses.replace(data, data_path=(prefix(data, "a"),), split="80,15,5", num_workers=0))
    run.model.seq_length, run.training.micro_batch_size = SEQ, 2
    run.data.data_cache_path = str(tmp_path / "cache")
    return run


def prefix(data: DataConfig, name: str) -> str:
    return str(Path(data.vocab_file).parent / f"{name}_text_document")


def build(config: RunConfig, *num_samples: int):
    """Training, validation and test data; None where there are none."""
    found = build_datasets(config, build_tokenizer(config.data), num_samples)
    return found.train, found.valid.get("valid"), found.test.get("test")


def everything(dataset) -> torch.Tensor:
    return torch.stack([dataset[index]["tokens"] for index in range(len(dataset))])


def test_items(config):
    train, valid, test = build(config, 30, 7, 3)
    assert [len(dataset) for dataset in (train, valid, test)] == [30, 7, 3]
    for item in (train[0], valid[6], test[2]):
        assert set(item) == {"tokens", "labels", "loss_mask"}
        assert item["tokens"].dtype == item["labels"].dtype == torch.int64
        assert item["loss_mask"].dtype == torch.float32
        assert all(value.shape == (SEQ,) for value in item.values())
        assert torch.equal(item["tokens"][1:], item["labels"][:-1])
        assert torch.equal(item["loss_mask"], torch.ones(SEQ))
    with pytest.raises(IndexError):
        train[30]


def test_one_epoch_reads_every_document_of_the_split_once(config):
    """Cut into sequences with one token of overlap, the text of the split comes back, and of no other split."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = IndexedDataset(config.data.data_path[0])
    documents, tokens = corpus.split_sizes(config.data.data_path[0], config.data.split)[0]
    assert documents == 48
    count = (tokens - 1) // SEQ
    train, _, _ = build(config, count, 0, 0)
    seen = np.bincount(everything(train).flatten().numpy(), minlength=1000)
    there = np.bincount(np.concatenate([source[index] for index in range(48)]), minlength=1000)
    assert (seen <= there).all()
    assert there.sum() - seen.sum() < SEQ + 1


def test_splits_with_a_share_of_zero_or_no_samples_are_none(config):
    config.data.split = "98,2"
    config.data.data_path = (prefix(config.data, "c"),)
    train, valid, test = build(config, 10, 5, 5)
    assert (len(train), len(valid), test) == (10, 5, None)
    assert build(config, 10, 0, 0)[1:] == (None, None)


def test_epochs_repeat_in_another_order(config):
    train, _, _ = build(config, 400, 0, 0)
    tokens = everything(train)
    assert len(torch.unique(tokens, dim=0)) > 100
    assert len(tokens) == 400


def test_same_seed_same_order_and_another_seed_another(config):
    first = everything(build(config, 50, 0, 0)[0])
    config.data.data_cache_path += "-other"
    assert torch.equal(everything(build(config, 50, 0, 0)[0]), first)
    config.training.seed += 1
    assert not torch.equal(everything(build(config, 50, 0, 0)[0]), first)


def test_longer_runs_and_other_batches_begin_with_the_same_samples(config):
    for paths in (config.data.data_path, ("3", prefix(config.data, "a"), "1", prefix(config.data, "b"))):
        config.data.data_path = paths
        longest = everything(build(config, 1500, 0, 0)[0])
        for count in (3, 160, 163, 499):
            train, _, _ = build(config, count, 0, 0)
            assert torch.equal(everything(train), longest[:count])
            assert torch.equal(everything(train.extended(700)), longest[:700])
        assert train.extended(20) is train


def test_a_corpus_that_grew_or_was_written_anew_under_its_name_is_read(config, tmp_path):
    """With one cache, and the same flags."""
    before = everything(build(config, 60, 0, 0)[0])
    for other in ("c", "a"):
        for suffix in (".bin", ".idx", ".json"):
            (tmp_path / f"corpus{suffix}").write_bytes(Path(f"{prefix(config.data, other)}{suffix}").read_bytes())
        config.data.data_path = (str(tmp_path / "corpus"),)
        found = everything(build(config, 60, 0, 0)[0])
        config.data.data_path = (prefix(config.data, other),)
        assert torch.equal(found, everything(build(config, 60, 0, 0)[0]))
        assert torch.equal(found, before) == (other == "a")


def test_a_changed_blend_reads_no_sequence_again(config):
    tokenizer = build_tokenizer(config.data)
    a, b, c = (prefix(config.data, name) for name in "abc")
    config.data.data_path = ("1", a, "1", b)
    first = build_datasets(config, tokenizer, (30, 0, 0))
    config.data.data_path = ("1", c, "2", a)
    with pytest.raises(DataError, match="--change-blend"):
        build_datasets(config, tokenizer, (60, 0, 0), ResumedData(first.state, 30))
    config.data.change_blend = True
    second = build_datasets(config, tokenizer, (60, 0, 0), ResumedData(first.state, 30))
    assert sorted(second.train.counts()) == [10, 20]
    with pytest.raises(IndexError, match="30 to 59"):
        second.train[29]
    config.data.data_path = (a,)
    alone = everything(build_datasets(config, tokenizer, (35, 0, 0)).train)
    then, now = everything(first.train), torch.stack([second.train[index]["tokens"] for index in range(30, 60)])
    of_a = [row for row in torch.cat([then, now]) if (alone == row).all(1).any()]
    assert torch.equal(torch.stack(of_a), alone)


def test_blend_takes_its_weights(config):
    """How often each dataset is read shows in the index of the blend."""
    config.data.data_path = ("3", prefix(config.data, "a"), "1", prefix(config.data, "b"))
    train, valid, _ = build(config, 101, 9, 0)
    assert (len(train), len(valid)) == (101, 9)
    assert sorted(train.counts()) == [25, 76]
    assert everything(train).shape == (101, SEQ)


def test_prefixes_without_weights_go_by_their_tokens_and_repeat(config):
    config.data.data_path = (prefix(config.data, "a"), prefix(config.data, "b"), prefix(config.data, "c"))
    config.data.split = "90,10,0"
    sizes = [dataset_checks.count_tokens(path) for path in config.data.data_path]
    count = 3 * sum(sizes) // SEQ
    train, _, _ = build(config, count, 0, 0)
    used = np.array(train.counts())
    np.testing.assert_allclose(np.sort(used) / count, np.sort(sizes) / sum(sizes), atol=2 / count)
    assert train[count - 1]["tokens"].shape == (SEQ,)


@pytest.mark.parametrize("blended", [False, True])
def test_cache_is_used_and_a_damaged_one_is_rebuilt(config, blended):
    if blended:
        config.data.data_path = ("1", prefix(config.data, "a"), "1", prefix(config.data, "b"))
    expected = everything(build(config, 60, 0, 0)[0])
    folder = Path(config.data.data_cache_path)
    built = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert len(built) == (4 if blended else 2)
    assert not list(folder.glob(".*"))
    assert torch.equal(everything(build(config, 60, 0, 0)[0]), expected)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == built
    for path in built:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert torch.equal(everything(build(config, 60, 0, 0)[0]), expected)
        assert path.read_bytes() == content
        path.write_bytes(content[:-8])
        assert torch.equal(everything(build(config, 60, 0, 0)[0]), expected)
        path.write_bytes(b"")
        assert torch.equal(everything(build(config, 60, 0, 0)[0]), expected)


def test_a_disk_that_is_full_leaves_no_index(config, monkeypatch):
    folder = Path(config.data.data_cache_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused(config, f"cannot write the sample index to {folder}", "No space left", "--data-cache-path")
    assert not list(folder.iterdir())
    build(config, 20, 5, 0)


def test_default_cache_lies_beside_the_dataset(config):
    config.data.data_cache_path = None
    build(config, 10, 0, 0)
    assert list((Path(config.data.data_path[0]).parent / "index-cache").glob("*.npy"))


def test_a_pickled_dataset_is_small_and_the_same(config):
    train, _, _ = build(config, 3000, 0, 0)
    expected = everything(train)
    pickled = pickle.dumps(train)
    assert len(pickled) < 5000
    assert torch.equal(everything(pickle.loads(pickled)), expected)


def test_importing_megatron_core_is_quiet():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", "import megatron.data.core_order"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------------------------------------------------- errors


def refused(config: RunConfig, *words: str, samples=(20, 5, 0), tokenizer=None) -> None:
    with pytest.raises(DataError) as error:
        build_datasets(config, tokenizer or build_tokenizer(config.data), samples)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ((), ("--data-path is missing",)),
        (("1", "a", "b"), ("must alternate",)),
        (("1", "a", "x", "b"), ("must alternate",)),
        (("1", "a", "0", "b"), ("the weight of b is 0",)),
        (("nan", "a", "1", "b"), ("the weight of a is nan",)),
        (("a", "a"), ("more than once",)),
    ],
)
def test_wrong_blends(config, path, words):
    config.data.data_path = path
    refused(config, *words)


@pytest.mark.parametrize("split", ["", "a", "98;2", "1,1,1,1", "0,0,0", "-1,2,0", "1e-3,1,0", "98,,2"])
def test_wrong_splits(config, split):
    config.data.split = split
    refused(config, "--split", "98,2,0")


def test_no_share_for_training(config):
    config.data.split = "0,100,0"
    refused(config, "--split '0,100,0' leaves nothing for training")


def test_missing_files_are_all_named_with_a_hint(config):
    good = config.data.data_path[0]
    config.data.data_path = (good.removesuffix("_text_document"), "/no/such", f"{good}.bin")
    refused(config, f"use {good}\n", "no file /no/such.idx or /no/such.bin", f"without its ending: {good}")


def test_splits_without_documents_or_too_short(config):
    config.data.split = "99.9,0.1,0"
    refused(config, "the valid split gets no document", "--split 99.9,0.1,0")
    config.data.split, config.model.seq_length = "98,2,0", 2000
    refused(config, "the valid split has", "one sample takes 2001")


def copied(config: RunConfig, folder: Path) -> str:
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"copy{suffix}").write_bytes(Path(f"{config.data.data_path[0]}{suffix}").read_bytes())
    config.data.data_path = (str(folder / "copy"),)
    return config.data.data_path[0]


def test_one_token_beyond_the_vocabulary_is_found_wherever_it_is(config, tmp_path):
    path = copied(config, tmp_path)
    tokens = np.fromfile(f"{path}.bin", np.uint16)
    tokens[-1] = build_tokenizer(config.data).vocab_size  # a row that only pads the vocabulary
    tokens.tofile(f"{path}.bin")
    refused(config, f"holds token {tokens[-1]}, but the vocabulary", f"ends at {tokens[-1] - 1}")
    config.data.allow_tokenizer_mismatch = True
    refused(config, f"holds token {tokens[-1]}")


def test_damaged_files(config, tmp_path):
    path = copied(config, tmp_path)
    content = Path(f"{path}.bin").read_bytes()
    Path(f"{path}.bin").write_bytes(content[:-2])
    refused(config, "the .bin has", "were not copied whole")
    Path(f"{path}.bin").write_bytes(b"")
    refused(config, "the .bin has 0 bytes")
    Path(f"{path}.bin").write_bytes(content)
    index = Path(f"{path}.idx").read_bytes()
    for wrong in (b"", b"something else, and long enough to have a header", index[:-1], index[:30]):
        Path(f"{path}.idx").write_bytes(wrong)
        refused(config, "is no index of a dataset, or a damaged one")
    for place, words in ((40, "the .idx is damaged between sequences"), (-12, "its documents do not end where")):
        wrong = bytearray(index)
        wrong[place] ^= 64  # would train on what stands elsewhere
        Path(f"{path}.idx").write_bytes(wrong)
        refused(config, words)
    Path(f"{path}.idx").write_bytes(index)
    build(config, 20, 5, 0)


def test_another_tokenizer_is_refused_by_the_manifest(config, tmp_path):
    other = build_tokenizer(corpus.hugging_face(tmp_path))
    mine = build_tokenizer(config.data)
    refused(config, "GPT2BPETokenizer", mine.fingerprint[:12], other.fingerprint[:12], tokenizer=other)
    config.data.allow_tokenizer_mismatch = True
    assert len(build_datasets(config, other, (20, 5, 0)).train) == 20
    refused(config, "holds token", "ends at 256", tokenizer=build_tokenizer(DataConfig(tokenizer_type="ByteTokenizer")))


def test_without_a_manifest_tokens_are_compared_with_the_vocabulary(config, tmp_path):
    path = copied(config, tmp_path)
    Path(f"{path}.json").unlink()
    build(config, 20, 5, 0)
    small = build_tokenizer(corpus.sentencepiece(tmp_path))
    refused(config, "ends at 399", tokenizer=small)


def test_a_manifest_of_other_files(config, tmp_path):
    path = copied(config, tmp_path)
    facts = json.loads(Path(f"{path}.json").read_text())
    Path(f"{path}.json").write_text(json.dumps(facts | {"tokens": 1}))
    refused(config, "speaks of 1 tokens")
    Path(f"{path}.json").write_text('{"other": 1}')
    refused(config, "is no manifest")


def test_a_cache_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.data.data_cache_path = str(tmp_path / "file" / "cache")
    refused(config, "--data-cache-path")


def test_a_validation_set_that_repeats_is_said(config, caplog):
    with caplog.at_level(logging.WARNING):
        build(config, 20, 5, 0)
        assert "repeat" not in caplog.text
        build(config, 20, 500, 0)
        assert "500 samples repeat some of them" in caplog.text


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_the_samples_in_order(config):
    train, _, _ = build(config, 41, 0, 0)
    for dp in (1, 2, 4):
        ranks = [list(batches(train, config, rank, dp, 0)) for rank in range(dp)]
        assert [len(rank) for rank in ranks] == [40 // (2 * dp)] * dp
        for number in range(len(ranks[0]) * dp):
            batch = ranks[number % dp][number // dp]
            assert batch["sample_index"] == 2 * number
            assert isinstance(batch["sample_index"], int)
            for name in ("tokens", "labels", "loss_mask"):
                expected = torch.stack([train[2 * number][name], train[2 * number + 1][name]])
                assert torch.equal(batch[name], expected)


def test_resume_at_any_sample(config):
    train, _, _ = build(config, 24, 0, 0)
    whole = list(batches(train, config, 0, 1, 0))
    for consumed in range(0, 24, 2):
        rest = list(batches(train, config, 0, 1, consumed))
        assert [batch["sample_index"] for batch in rest] == list(range(consumed, 24, 2))
        for old, new in zip(whole[consumed // 2 :], rest, strict=True):
            assert torch.equal(old["tokens"], new["tokens"])
    assert list(batches(train, config, 0, 1, 24)) == []


def test_loading_draws_no_randomness_of_the_run(config):
    train, _, _ = build(config, 24, 0, 0)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(batches(train, config, 0, 1, 0))
    assert torch.equal(torch.rand(3), expected)


def test_without_distributed_no_warning_escapes(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(config, 24, 5, 0)
