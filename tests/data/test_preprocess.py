"""JSON lines -> .bin/.idx: exactly Megatron's files, whole or not at all, the same for any number of workers."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import corpus
import numpy as np
import pytest
from preprocessing import everything_named, files, run

from megatron.data import inspection, manifest, merging, preprocess
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.reading import read_batches
from megatron.data.tokenizer import build_tokenizer

TEXTS = corpus.NASTY + corpus.MARKERS + corpus.english(60) + corpus.random_texts(60, seed=5)


@pytest.mark.parametrize("make", [corpus.gpt2, corpus.sentencepiece, corpus.hugging_face])
@pytest.mark.parametrize("append_eod", [True, False])
def test_text_to_files_to_text(make, append_eod, tmp_path):
    texts = [text.replace("\u2581", "") for text in TEXTS]
    done = run(tmp_path, texts, make=make, append_eod=append_eod)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = build_tokenizer(make(tmp_path))
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert dataset.index.dtype == np.uint16
    ends = dataset.document_indices
    back = []
    for first, last in itertools.pairwise(ends):
        ids = [int(id) for sequence in range(first, last) for id in dataset[sequence]]
        assert (ids[-1:] == [tokenizer.eod]) == (append_eod and bool(ids))
        back.append(tokenizer.decode(ids[:-1] if append_eod else ids))
    assert back == texts
    assert (done.documents, done.tokens) == (len(texts), int(dataset.sequence_lengths.sum()))


def test_files_are_those_of_megatrons_own_builder(tmp_path):
    """As Megatron's tool calls it: an empty document adds to the documents but not to the sequences."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    run(tmp_path, TEXTS)
    tokenizer = build_tokenizer(corpus.gpt2(tmp_path))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        ids = [*ids, tokenizer.eod] if ids else []
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = files(tmp_path)
    assert ours[".bin"] == (tmp_path / "theirs.bin").read_bytes()
    assert ours[".idx"] == (tmp_path / "theirs.idx").read_bytes()


def test_large_vocabularies_take_four_bytes():
    assert IndexedWriter.dtype_for(65_499) is np.uint16
    assert IndexedWriter.dtype_for(65_500) is np.int32


def test_number_of_workers_batches_and_compression_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "read_batches", functools.partial(read_batches, batch_bytes=2000))
    run(tmp_path, TEXTS)
    expected = files(tmp_path)
    for source, workers in (("in.jsonl.gz", 1), ("in.jsonl.zst", 2)):
        run(tmp_path, TEXTS, name="other", source=source, workers=workers)
        found = files(tmp_path, "other_text_document")
        assert found[".bin"] == expected[".bin"]
        assert found[".idx"] == expected[".idx"]
        (tmp_path / source).unlink()
        for suffix in found:
            (tmp_path / f"other_text_document{suffix}").unlink()


def test_several_keys_and_files(tmp_path):
    lines = [{"title": f"t{n}", "text": text} for n, text in enumerate(corpus.english(20))]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(paths, (lines[:7], lines[7:]), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in part))
    done = preprocess.preprocess(
        [str(path) for path in paths],
        str(tmp_path / "out"),
        corpus.gpt2(tmp_path),
        json_keys=("title", "text"),
        workers=0,
    )
    assert done.prefixes == [str(tmp_path / "out_title_document"), str(tmp_path / "out_text_document")]
    run(tmp_path, [line["text"] for line in lines], name="alone", append_eod=False)
    assert files(tmp_path)[".bin"] == files(tmp_path, "alone_text_document")[".bin"]
    titles = manifest.read(done.prefixes[0])
    assert titles.documents == 20
    assert [entry["path"] for entry in titles.inputs] == [str(path) for path in paths]


def test_manifest(tmp_path):
    done = run(tmp_path, TEXTS)
    facts = manifest.read(done.prefixes[0])
    tokenizer = build_tokenizer(corpus.gpt2(tmp_path))
    assert facts.tokenizer == {
        "kind": "GPT2BPETokenizer",
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
    assert (facts.documents, facts.tokens, facts.rejected) == (done.documents, done.tokens, 0)
    content = (tmp_path / "in.jsonl").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert facts.inputs == [{"path": str(tmp_path / "in.jsonl"), "bytes": len(content), "sha256": sha256}]
    for name, digest in facts.checksums.items():
        assert digest == hashlib.sha256(files(tmp_path)[f".{name}"]).hexdigest()
    assert (facts.dtype, facts.append_eod, facts.json_key) == ("uint16", True, "text")
    assert facts.versions["megatron-core"]


def broken_file(folder: Path, good: int, broken: list[bytes]) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in corpus.english(good)]
    for number, line in enumerate(broken):
        lines.insert(2 + 3 * number, line + b"\n")
    (folder / "in.jsonl").write_bytes(b"".join(lines))


def test_broken_lines_are_listed_and_left_out(tmp_path):
    broken = [b"{", b'{"text": "\xff"}', b'{"other": "x"}', b""]
    broken_file(tmp_path, 20, broken)
    done = run(tmp_path, None, max_rejected=0.2)
    listed = [json.loads(line) for line in Path(done.rejected_file).read_text().splitlines()]
    assert [(entry["line"], entry["text"]) for entry in listed] == [
        (3, "{"),
        (6, '{"text": "\\xff"}'),
        (9, '{"other": "x"}'),
    ]
    assert all(entry["file"] == str(tmp_path / "in.jsonl") and entry["reason"] for entry in listed)
    assert (done.documents, done.rejected) == (20, 3)
    assert manifest.read(done.prefixes[0]).rejected == 3
    run(tmp_path, corpus.english(20), name="whole")
    assert files(tmp_path)[".bin"] == files(tmp_path, "whole_text_document")[".bin"]


def test_too_many_broken_lines_publish_nothing(tmp_path):
    broken_file(tmp_path, 20, [b"{", b"}"])
    with pytest.raises(DataError) as error:
        run(tmp_path, None)
    for words in (
        "2 of 22 lines",
        "--max-rejected 0.001",
        "in.jsonl, line 3: not JSON",
        "out.incomplete.rejected.jsonl",
    ):
        assert words in str(error.value)
    assert everything_named(tmp_path) == ["out.incomplete.rejected.jsonl"]
    run(tmp_path, corpus.english(3))
    assert not any("rejected" in name for name in everything_named(tmp_path))


def test_a_wrong_key_stops_early(tmp_path, monkeypatch):
    seen = []
    small = functools.partial(read_batches, batch_bytes=2000)
    monkeypatch.setattr(preprocess, "read_batches", lambda *args, **options: _counted(small(*args, **options), seen))
    with pytest.raises(DataError, match=r"(?s)already .* of the first .* no key 'body'"):
        run(tmp_path, corpus.english(2000), json_keys=("body",))
    assert sum(seen) < 300
    assert everything_named(tmp_path) == ["out.incomplete.rejected.jsonl"]


def test_existing_output_is_kept_unless_overwrite(tmp_path):
    run(tmp_path, corpus.english(5))
    before = files(tmp_path)
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, corpus.english(6))
    assert files(tmp_path) == before
    with pytest.raises(DataError, match="--overwrite"):  # the input is of after the dataset
        run(tmp_path, corpus.english(5))
    run(tmp_path, corpus.english(6), overwrite=True)
    assert files(tmp_path)[".bin"] != before[".bin"]
    assert len(everything_named(tmp_path)) == 3


def test_the_list_of_another_run_is_kept_unless_overwrite(tmp_path):
    """Of other keys under the same prefix, so that its datasets do not stand in the way."""
    broken_file(tmp_path, 5, [b"{"])
    before = Path(run(tmp_path, None, max_rejected=0.5).rejected_file).read_text()
    (tmp_path / "titles.jsonl").write_text('{"title": "a"}\n')
    options = {"source": "titles.jsonl", "json_keys": ("title",)}
    with pytest.raises(DataError, match=r"out\.rejected\.jsonl exists already.*--overwrite"):
        run(tmp_path, None, **options)
    assert (tmp_path / "out.rejected.jsonl").read_text() == before
    run(tmp_path, None, overwrite=True, **options)


def test_output_beside_its_input(tmp_path):
    """In one folder, where a second run would read what the first has left out."""
    folder = tmp_path / "folder"
    folder.mkdir()
    broken_file(folder, 20, [b"{"])
    options = {"workers": 0, "max_rejected": 0.5, "num_shards": 2}
    shards = []
    for index in (0, 1):
        data = corpus.byte_level(tmp_path)
        shards += preprocess.preprocess([str(folder)], f"{folder}/out", data, shard_index=index, **options).prefixes
    assert merging.merge(shards, f"{folder}/all").documents == 20


def test_names_that_are_no_utf_8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    Path(path).write_text('{"text": "a"}\n{\n')
    done = preprocess.preprocess([path], f"{tmp_path}/out", corpus.byte_level(tmp_path), workers=0, max_rejected=0.5)
    (entry,) = map(json.loads, Path(done.rejected_file).read_text(encoding="utf-8").splitlines())
    assert entry["file"] == path
    assert [part["path"] for part in manifest.read(done.prefixes[0]).inputs] == [path]
    assert inspection.verify(done.prefixes[0]) == ([], [])


def test_the_same_command_again_has_nothing_to_do(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n{"text": "c"}\n')
    done = run(tmp_path, None, max_rejected=0.5, num_shards=2, shard_index=0)
    assert not done.existing
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "read_batches", None)
        again = run(tmp_path, None, max_rejected=0.5, num_shards=2, shard_index=0, workers=1)
    assert again == dataclasses.replace(done, existing=True)
    for options in ({"append_eod": False}, {"make": corpus.byte_level}):
        with pytest.raises(DataError, match="exist already"):
            run(tmp_path, None, max_rejected=0.5, num_shards=2, shard_index=0, **options)
    monkeypatch.setattr(manifest, "versions", lambda: {"tokenizers": "another"})
    with pytest.raises(DataError, match="exist already"):
        run(tmp_path, None, max_rejected=0.5, num_shards=2, shard_index=0)


def test_lost_bytes_are_noticed(tmp_path):
    writer = IndexedWriter(str(tmp_path / "d"), np.uint16)
    writer.add(b"\1\0\2\0", np.array([2]))
    with open(tmp_path / "d.incomplete.bin", "ab") as file:
        file.write(b"\1\0")
    with pytest.raises(DataError, match=r"the \.bin has 6 bytes, but its \.idx speaks of 4"):
        writer.finish(manifest.DatasetManifest({}, "text", False, "uint16", 1, 3, 0, []))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_keys": ("text", "text")}, "more than once"),
        ({"workers": -1}, "--workers -1"),
        ({"workers": 100_000}, "--workers 100000: expected .* at most"),
        ({"json_keys": ("../text",)}, "a key becomes part of a file's name"),
        ({"name": "in.jsonl/out"}, r"in\.jsonl is a file, expected a folder"),
        ({"max_rejected": 2.0}, "--max-rejected 2"),
    ],
)
def test_wrong_options(options, words, tmp_path):
    with pytest.raises(DataError, match=words):
        run(tmp_path, corpus.english(2), **options)
    assert everything_named(tmp_path) == []


@pytest.mark.parametrize("prefix", ["", "folder/"])
def test_a_prefix_without_a_name(prefix, tmp_path):
    path = corpus.write_jsonl(tmp_path / "in.jsonl", ["x"])
    with pytest.raises(DataError, match="expected a folder and the beginning of a name"):
        preprocess.preprocess([str(path)], prefix, corpus.byte_level(tmp_path), workers=0)


def test_nothing_but_empty_documents(tmp_path):
    with pytest.raises(DataError, match="not one token"):
        run(tmp_path, ["", ""])
    assert everything_named(tmp_path) == []


def test_several_formats_at_once_and_shards(tmp_path):
    """Any number of shards, merged, is the dataset that one run makes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = corpus.english(60) + corpus.NASTY
    corpus.write_jsonl(folder / "a.jsonl", texts)
    corpus.write_jsonl(folder / "b.jsonl.gz", texts[:30])
    corpus.write_parquet(folder / "c.parquet", {"text": texts[30:]}, row_group_size=10)
    (folder / "d.txt").write_bytes("\ufeffone document\r\n\r\nas it is\n".encode())
    (folder / "e.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes().replace(b"\n", b"\r\n") + b"{\n"
    )
    data = corpus.gpt2(tmp_path)
    options = {"workers": 0, "append_eod": True, "max_rejected": 0.1}
    done = preprocess.preprocess([str(folder)], str(tmp_path / "out"), data, **options)
    expected = [*texts, *texts[:30], *texts[30:], "one document\r\n\r\nas it is\n", *texts]
    run(tmp_path, expected, name="expected", make=lambda _: data)
    assert files(tmp_path)[".bin"] == files(tmp_path, "expected_text_document")[".bin"]
    assert files(tmp_path)[".idx"] == files(tmp_path, "expected_text_document")[".idx"]
    for count in (2, 5):
        rejected = 0
        for index in range(count):
            shard = preprocess.preprocess(
                [str(folder)], str(tmp_path / "part"), data, num_shards=count, shard_index=index, **options
            )
            rejected += shard.rejected
            if shard.rejected:
                (listed,) = map(json.loads, Path(shard.rejected_file).read_text().splitlines())
                assert (listed["file"], listed["line"]) == (str(folder / "e.jsonl"), len(texts) + 1)
        assert (done.rejected, rejected) == (1, 1)
        shards = sorted(str(path)[:-4] for path in tmp_path.glob(f"part-*-of-{count:05d}_text_document.idx"))
        assert len(shards) == count
        merging.merge(shards[::-1], str(tmp_path / f"merged{count}"))
        assert files(tmp_path, f"merged{count}")[".bin"] == files(tmp_path)[".bin"]
        assert files(tmp_path, f"merged{count}")[".idx"] == files(tmp_path)[".idx"]


def test_more_shards_than_compressed_files(tmp_path, capsys):
    """Those without a file are empty, which is said, and merge all the same."""
    paths = [
        str(corpus.write_jsonl(tmp_path / name, corpus.english(9, seed=len(name)))) for name in ("a.jsonl.gz", "b.zst")
    ]
    data = corpus.gpt2(tmp_path)
    whole = preprocess.preprocess(paths, str(tmp_path / "out"), data, workers=0).prefixes[0]
    assert "empty" not in capsys.readouterr().err
    shards = []
    for index in range(4):
        options = {"num_shards": 4, "shard_index": index, "workers": 0}
        shards += preprocess.preprocess(paths, str(tmp_path / "part"), data, **options).prefixes
        assert "there are 2 files" in capsys.readouterr().err
    assert sorted(manifest.read(prefix).documents for prefix in shards) == [0, 0, 9, 9]
    merged = merging.merge(shards, str(tmp_path / "merged")).prefix
    for suffix in (".bin", ".idx"):
        assert Path(merged + suffix).read_bytes() == Path(whole + suffix).read_bytes()


def test_standard_input(tmp_path, monkeypatch):
    path = corpus.write_jsonl(tmp_path / "in.jsonl", corpus.english(30))
    run(tmp_path, None)
    with open(path, "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        preprocess.preprocess(["-"], str(tmp_path / "piped"), corpus.gpt2(tmp_path), append_eod=True, workers=0)
    assert files(tmp_path, "piped_text_document")[".bin"] == files(tmp_path)[".bin"]
    (entry,) = manifest.read(str(tmp_path / "piped_text_document")).inputs
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def _counted(batches, seen):
    for batch in batches:
        seen.append(len(batch.records))
        yield batch
