"""Datasets into one and one into several: the documents stay the same, and what does not go together is refused."""

import dataclasses
import json
from pathlib import Path

import corpus
import numpy as np
import pytest

from megatron.data import manifest, merging
from megatron.data.errors import DataError
from megatron.data.merging import merge, split
from megatron.data.preprocess import preprocess


def make(folder: Path, name: str, texts: list[str], data=None, **options) -> str:
    path = corpus.write_jsonl(folder / f"{name}.jsonl", texts)
    options = {"append_eod": True, "workers": 0} | options
    return preprocess([str(path)], str(folder / name), data or corpus.gpt2(folder), **options).prefixes[0]


def content(prefix: str) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def test_merging_is_preprocessing_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "CHUNK", 64)  # many pieces, documents longer than one
    texts = [corpus.english(30), ["", *corpus.NASTY, ""], ["x"]]
    parts = [make(tmp_path, f"part{number}", part) for number, part in enumerate(texts)]
    whole = make(tmp_path, "whole", [text for part in texts for text in part])
    writer = merge(parts, str(tmp_path / "merged"))
    assert content(str(tmp_path / "merged")) == content(whole)
    facts, expected = manifest.read(str(tmp_path / "merged")), manifest.read(whole)
    assert (writer.documents, writer.tokens) == (facts.documents, facts.tokens) == (expected.documents, expected.tokens)
    assert facts.checksums == expected.checksums
    assert facts.made_from == parts
    assert [Path(entry["path"]).name for entry in facts.inputs] == ["part0.jsonl", "part1.jsonl", "part2.jsonl"]


def test_datasets_of_other_tools_keep_their_sequences(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def build(name: str, *documents: list[int]) -> str:
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for lengths in documents:
            builder.add_document(torch.arange(sum(lengths)), lengths)
        builder.finalize(str(tmp_path / f"{name}.idx"))
        return str(tmp_path / name)

    first, second = [[3, 2], [], [4]], [[], [1, 1, 1], [7]]
    parts, whole = [build("a", *first), build("b", *second)], build("whole", *first, *second)
    merge(parts, str(tmp_path / "merged"))
    assert content(str(tmp_path / "merged")) == content(whole)
    assert not (tmp_path / "merged.json").exists()


def test_splits_are_those_of_training(tmp_path):
    prefix = make(tmp_path, "whole", corpus.english(101))
    written = split(prefix, str(tmp_path / "cut"), "90,7,3")
    assert [Path(writer.prefix).name for writer in written] == ["cut_train", "cut_valid", "cut_test"]
    assert [(w.documents, w.tokens) for w in written] == corpus.split_sizes(prefix, "90,7,3")
    merge([writer.prefix for writer in written], str(tmp_path / "back"))
    assert content(str(tmp_path / "back")) == content(prefix)
    assert len(split(prefix, str(tmp_path / "two"), "9,0,1")) == 2
    with pytest.raises(DataError, match="leaves no document for test"):
        split(prefix, str(tmp_path / "none"), "99,1,0.0001")
    assert not list(tmp_path.glob("none*"))


def test_empty_documents_are_cut_as_training_cuts(tmp_path):
    """Which counts sequences, and empty documents have none."""
    texts = [*[""] * 30, *corpus.english(40), *[""] * 9]
    prefix = make(tmp_path, "whole", texts)
    written = split(prefix, str(tmp_path / "cut"), "50,30,20")
    assert [w.tokens for w in written] == [tokens for _, tokens in corpus.split_sizes(prefix, "50,30,20")]
    assert [w.documents for w in written] == [30 + 20, 12, 8 + 9]
    merge([w.prefix for w in written], str(tmp_path / "back"))
    assert content(str(tmp_path / "back")) == content(prefix)


def test_a_split_that_was_stopped_is_finished_by_the_same_command(tmp_path, monkeypatch):
    prefix, out = make(tmp_path, "whole", corpus.english(40)), str(tmp_path / "cut")
    written = split(prefix, str(tmp_path / "whole"), "2,1,1")
    write = merging._write

    def stop(target, *arguments):
        if target.endswith("_valid"):
            raise OSError(28, "No space left on device")
        return write(target, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_write", stop)
        with pytest.raises(OSError, match="No space"):
            split(prefix, out, "2,1,1")
    assert [made.existing for made in split(prefix, out, "2,1,1")] == [True, False, False]
    for made in written:
        assert content(made.prefix.replace("whole_", "cut_")) == content(made.prefix)
    assert all(made.existing for made in split(prefix, out, "2,1,1"))
    with pytest.raises(DataError, match="exist already"):
        split(prefix, out, "1,1,2")


def test_a_split_whose_last_part_exists_writes_nothing(tmp_path):
    prefix = make(tmp_path, "whole", corpus.english(40))
    (tmp_path / "cut_test.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"cut_test\.bin exist already"):
        split(prefix, str(tmp_path / "cut"), "2,1,1")
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut_test.bin"]


def test_what_does_not_go_together(tmp_path):
    texts = corpus.english(5)
    mine = make(tmp_path, "mine", texts)
    (tmp_path / "sp").mkdir()
    other = make(tmp_path, "other", texts, corpus.sentencepiece(tmp_path / "sp"))
    ends = make(tmp_path, "ends", texts, append_eod=False)
    wide = str(tmp_path / "wide")
    np.zeros(3, np.int32).tofile(f"{wide}.bin")
    from megatron.data.index_file import write_index

    with open(f"{wide}.idx", "wb") as file:
        write_index(file, np.dtype(np.int32), np.array([3]).astype(np.int32), np.array([1]))
    for prefixes, words in (
        ([mine, other], r"SentencePieceTokenizer \w{12}, .*mine_text_document with GPT2BPETokenizer"),
        ([mine, ends], "only one of .* was made with --append-eod"),
        ([mine, wide], "has tokens of type int32, .* uint16"),
        ([mine], "two or more"),
        ([mine, mine], "more than once"),
        ([mine, f"{tmp_path}/../{tmp_path.name}/mine_text_document"], "more than once"),
        ([mine, "/no/such"], r"there is no /no/such\.idx"),
    ):
        with pytest.raises(DataError, match=words):
            merge(prefixes, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(DataError, match="--overwrite"):
        merge([mine, make(tmp_path, "again", texts)], other)


def test_all_shards_must_be_there(tmp_path):
    texts = corpus.english(40)
    shards = [make(tmp_path, "s", texts, num_shards=3, shard_index=index) for index in range(3)]
    with pytest.raises(DataError, match="2 of 3 shards; missing: 1"):
        merge([shards[2], shards[0]], str(tmp_path / "out"))
    facts = json.loads(Path(f"{shards[0]}.json").read_text())
    for suffix in (".bin", ".idx"):
        Path(f"{tmp_path}/copy{suffix}").write_bytes(Path(f"{shards[0]}{suffix}").read_bytes())
    Path(f"{tmp_path}/copy.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not of one corpus"):
        merge([*shards, str(tmp_path / "copy")], str(tmp_path / "out"))


def test_shards_of_different_runs(tmp_path):
    texts = corpus.english(40)
    first, second = (make(tmp_path, "s", texts, num_shards=2, shard_index=index) for index in range(2))
    third = make(tmp_path, "s", texts, num_shards=3, shard_index=1)
    whole = make(tmp_path, "whole", texts)
    for other, words in ((third, "one of 2 shards, .* is one of 3 shards"), (whole, "is no shard")):
        with pytest.raises(DataError, match=words):
            merge([first, second, other], str(tmp_path / "out"))
    second = make(tmp_path, "s", texts[1:], num_shards=2, shard_index=1, overwrite=True)
    with pytest.raises(DataError, match="are shards of different inputs or flags"):
        merge([first, second], str(tmp_path / "out"))


def test_the_same_merge_again_has_nothing_to_do(tmp_path):
    parts = [make(tmp_path, name, corpus.english(5, seed=ord(name))) for name in "ab"]
    done = merge(parts, str(tmp_path / "out"))
    before = content(str(tmp_path / "out"))
    assert merge(parts, str(tmp_path / "out")) == dataclasses.replace(done, existing=True)
    with pytest.raises(DataError, match="exist already"):
        merge(parts[::-1], str(tmp_path / "out"))
    make(tmp_path, "b", corpus.english(5), overwrite=True)
    with pytest.raises(DataError, match="exist already"):
        merge(parts, str(tmp_path / "out"))
    assert content(str(tmp_path / "out")) == before


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    parts = [make(tmp_path, name, corpus.english(5)) for name in ("a", "b")]
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        merge(parts, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        (".bin", lambda data: data[:9] + b"\x00\x01" + data[11:], r"mine_text_document\.bin is not the file that its"),
        (".idx", lambda data: data[:34] + b"\x01\x02" + data[36:], "the .idx is damaged between sequences 0"),
        (".idx", lambda data: data[:-20] + b"\x01\x02" + data[-18:], "its documents do not end where its sequences do"),
        (".json", lambda data: b"[]", "is no manifest"),
        (
            ".json",
            lambda data: json.dumps(json.loads(data) | {"tokenizer": {}}).encode(),
            r"tokenizer is \{\}, expected",
        ),
        (
            ".json",
            lambda data: json.dumps(json.loads(data) | {"shard": 3}).encode(),
            "shard is 3, expected index, count",
        ),
        (".json", lambda data: json.dumps(json.loads(data) | {"inputs": None}).encode(), "inputs is None"),
    ],
)
def test_damage_is_not_merged_and_not_cut(suffix, change, words, tmp_path):
    mine, other = (make(tmp_path, name, corpus.english(30)) for name in ("mine", "other"))
    path = Path(mine + suffix)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        merge([mine, other], str(tmp_path / "out"))
    with pytest.raises(DataError, match=words):
        split(mine, str(tmp_path / "out"), "90,10,0")
    assert not list(tmp_path.glob("out*"))
