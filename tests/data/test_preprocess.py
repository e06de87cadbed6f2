"""JSON lines -> .bin/.idx: exactly Megatron's files, whole or not at all, the same for any number of workers."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus
import numpy as np
import pytest

from megatron.data import manifest, preprocess
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.jsonl import read_batches
from megatron.data.tokenizer import build_tokenizer

TEXTS = corpus.NASTY + corpus.MARKERS + corpus.english(60) + corpus.random_texts(60, seed=5)


def run(folder: Path, texts: list[str] | None, name="out", make=corpus.gpt2, source="in.jsonl", **options):
    """Preprocess in this process; returns the summary."""
    path = folder / source
    if texts is not None:
        corpus.write_jsonl(path, texts)
    options = {"workers": 0, "append_eod": True} | options
    return preprocess.preprocess([str(path)], str(folder / name), make(folder), **options)


def files(folder: Path, name="out_text_document") -> dict[str, bytes]:
    return {suffix: (folder / f"{name}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}


def everything_named(folder: Path, start="out") -> list[str]:
    return sorted(path.name for path in folder.glob(f"*{start}*"))


@pytest.mark.parametrize("make", [corpus.gpt2, corpus.sentencepiece, corpus.hugging_face])
@pytest.mark.parametrize("append_eod", [True, False])
def test_text_to_files_to_text(make, append_eod, tmp_path):
    texts = [text.replace("\u2581", "") for text in TEXTS]
    done = run(tmp_path, texts, make=make, append_eod=append_eod)
    from megatron.data.core_datasets import IndexedDataset

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

    from megatron.data.core_datasets import IndexedDatasetBuilder

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
    monkeypatch.setattr(preprocess, "read_batches", lambda paths: read_batches(paths, 2000))
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
    assert facts.inputs == [{"path": str(tmp_path / "in.jsonl"), "bytes": (tmp_path / "in.jsonl").stat().st_size}]
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
    for words in ("2 of 22 lines", "--max-rejected 0.001", "in.jsonl, line 3: not JSON", "out.rejected.jsonl"):
        assert words in str(error.value)
    assert everything_named(tmp_path) == ["out.rejected.jsonl"]
    run(tmp_path, corpus.english(3))
    assert "out.rejected.jsonl" not in everything_named(tmp_path)


def test_a_wrong_key_stops_early(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(preprocess, "read_batches", lambda paths: _counted(read_batches(paths, 2000), seen))
    with pytest.raises(DataError, match=r"(?s)already .* of the first .* no key 'body'"):
        run(tmp_path, corpus.english(2000), json_keys=("body",))
    assert sum(seen) < 300
    assert everything_named(tmp_path) == ["out.rejected.jsonl"]


def test_existing_output_is_kept_unless_overwrite(tmp_path):
    run(tmp_path, corpus.english(5))
    before = files(tmp_path)
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, corpus.english(6))
    assert files(tmp_path) == before
    run(tmp_path, corpus.english(6), overwrite=True)
    assert files(tmp_path)[".bin"] != before[".bin"]
    assert len(everything_named(tmp_path)) == 3


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("at", ["encode", "finalize", "fsync", "replace"])
def test_a_failure_anywhere_leaves_no_new_index(at, overwrite, tmp_path, monkeypatch):
    if overwrite:
        run(tmp_path, corpus.english(5, seed=1))
    before = {name: (tmp_path / name).read_bytes() for name in everything_named(tmp_path)}

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "encode":
            patch.setattr(preprocess.LineEncoder, "__call__", fail)
        elif at == "finalize":
            from megatron.data.core_datasets import IndexedDatasetBuilder

            patch.setattr(IndexedDatasetBuilder, "finalize", fail)
        else:
            patch.setattr(os, at, fail)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, corpus.english(5), overwrite=True)
    after = {name: (tmp_path / name).read_bytes() for name in everything_named(tmp_path)}
    if at == "replace":
        assert not any(name.endswith(".idx") for name in after)
    else:
        assert after == before
    run(tmp_path, corpus.english(5), overwrite=True)
    assert everything_named(tmp_path) == [f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".json")]


def test_two_writers_of_one_dataset(tmp_path):
    writer = IndexedWriter(str(tmp_path / "out_text_document"), np.uint16)
    with pytest.raises(DataError, match="another process is writing"):
        run(tmp_path, corpus.english(5))
    writer.discard()
    assert run(tmp_path, corpus.english(5)).documents == 5


def test_lost_bytes_are_noticed(tmp_path):
    writer = IndexedWriter(str(tmp_path / "d"), np.uint16)
    writer.add(b"\1\0\2\0", np.array([2]))
    writer.tokens += 1
    with pytest.raises(DataError, match="4 bytes, expected 6"):
        writer.finish(manifest.Manifest({}, "text", False, "uint16", 1, 3, 0, []))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_keys": ("text", "text")}, "more than once"),
        ({"workers": -1}, "--workers -1"),
        ({"max_rejected": 2.0}, "--max-rejected 2"),
    ],
)
def test_wrong_options(options, words, tmp_path):
    with pytest.raises(DataError, match=words):
        run(tmp_path, corpus.english(2), **options)
    assert everything_named(tmp_path) == []


def test_nothing_but_empty_documents(tmp_path):
    with pytest.raises(DataError, match="not one token"):
        run(tmp_path, ["", ""])
    assert everything_named(tmp_path) == []


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_final_and_no_process(tmp_path):
    """SIGKILL in the middle; the next run needs no cleaning up."""
    corpus.write_jsonl(tmp_path / "in.jsonl", corpus.english(5_000))
    data = corpus.gpt2(tmp_path)
    tool = [sys.executable, str(corpus.ROOT / "tools" / "preprocess_data.py"), "--input", str(tmp_path / "in.jsonl")]
    tool += ["--output-prefix", str(tmp_path / "out"), "--workers", "1", "--log-interval", "100"]
    tool += ["--vocab-file", data.vocab_file, "--merge-file", data.merge_file]
    process = subprocess.Popen(tool, stderr=subprocess.PIPE, text=True)
    assert "documents" in process.stderr.readline()
    workers = [int(pid) for pid in children(process.pid)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert workers
    assert all(".incomplete." in name for name in everything_named(tmp_path, "document"))
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the killed run"
        time.sleep(0.1)
    done = run(tmp_path, None)
    assert done.documents == 5_000
    assert len(everything_named(tmp_path)) == 3


def children(pid: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(stat.parent.name)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _counted(batches, seen):
    for batch in batches:
        seen.append(len(batch.lines))
        yield batch
