"""A run that fails or is killed leaves nothing final; the same command makes the files of an undisturbed run."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import corpus
import numpy as np
import pytest
from preprocessing import alive, children, everything_named, files, run

from megatron.data import encoding, indexed_writer, manifest, preprocess
from megatron.data.errors import DataError
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.journal import Journal
from megatron.data.reading import read_batches


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("at", ["encode", "finalize", "fsync"])
def test_a_failure_anywhere_leaves_no_new_index(at, overwrite, tmp_path, monkeypatch):
    if overwrite:
        run(tmp_path, corpus.english(5, seed=1))
    before = {name: (tmp_path / name).read_bytes() for name in everything_named(tmp_path)}

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "encode":
            patch.setattr(encoding.BatchEncoder, "__call__", fail)
        elif at == "finalize":
            patch.setattr(indexed_writer, "write_index", fail)
        else:
            patch.setattr(os, at, fail)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, corpus.english(5), overwrite=True)
    after = {name: (tmp_path / name).read_bytes() for name in everything_named(tmp_path)}
    assert after == before
    run(tmp_path, corpus.english(5), overwrite=True)
    assert everything_named(tmp_path) == [f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".json")]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_interrupted_between_the_final_names(renamed, overwrite, tmp_path, monkeypatch):
    """No index without its data, and the same command gives the rest their names without tokenizing anything."""
    if overwrite:
        run(tmp_path, corpus.english(9, seed=1))
    calls = itertools.count()
    replace = os.replace

    def fail(*arguments):
        if next(calls) >= renamed:
            raise OSError(5, "Input/output error")
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            run(tmp_path, corpus.english(5), overwrite=overwrite)
    assert not (tmp_path / "out_text_document.idx").exists()
    monkeypatch.setattr(preprocess, "read_batches", None)
    done = run(tmp_path, None, overwrite=overwrite)
    assert done.documents == manifest.read(done.prefixes[0]).documents == 5
    assert everything_named(tmp_path) == [f"out_text_document{suffix}" for suffix in (".bin", ".idx", ".json")]


def test_a_failed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Also with several keys and broken lines, and whatever stands behind the last point in the files."""
    texts = corpus.english(400, words=10)
    lines = [json.dumps({"title": text[:9], "text": text}) if n % 50 else "{" for n, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = {"json_keys": ("title", "text"), "max_rejected": 0.1}
    small = functools.partial(read_batches, batch_bytes=1000)
    monkeypatch.setattr(preprocess, "read_batches", small)
    monkeypatch.setattr(preprocess, "JOURNAL_SECONDS", 0)
    run(tmp_path, None, name="whole", **options)
    starts = []

    def until(most):
        def read(*args, start, **others):
            starts.append(start.records)
            for number, batch in enumerate(small(*args, start=start, **others)):
                if number == most:
                    raise OSError(28, "No space left on device")
                yield batch

        return read

    for most in (4, 1, 7):
        monkeypatch.setattr(preprocess, "read_batches", until(most))
        with pytest.raises(OSError, match="No space"):
            run(tmp_path, None, **options)
        with open(tmp_path / "out_text_document.incomplete.bin", "ab") as file:
            file.write(b"written after the last point")
        assert not [name for name in everything_named(tmp_path) if ".incomplete" not in name]
    with pytest.raises(DataError, match=r"another one: it differs in append_eod\..*--overwrite"):
        run(tmp_path, None, append_eod=False, **options)
    monkeypatch.setattr(preprocess, "read_batches", until(10**9))
    run(tmp_path, None, **options)
    assert starts == sorted(starts)
    assert starts[0] == 0 < starts[1] < starts[2] < starts[3]
    for key in ("title", "text"):
        assert files(tmp_path, f"out_{key}_document") == files(tmp_path, f"whole_{key}_document")
    assert (tmp_path / "out.rejected.jsonl").read_text() == (tmp_path / "whole.rejected.jsonl").read_text()
    assert not [name for name in everything_named(tmp_path) if "incomplete" in name]


def test_unfinished_files_that_were_damaged_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "JOURNAL_SECONDS", 0)
    corpus.write_jsonl(tmp_path / "in.jsonl", corpus.english(50))
    with monkeypatch.context() as patch:
        patch.setattr(IndexedWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O")))
        with pytest.raises(OSError, match="I/O"):
            run(tmp_path, None)
    path = tmp_path / "out_text_document.incomplete.bin"
    content = path.read_bytes()
    for damaged in (content[:-1], b"\xff" + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"the disk lost data\. Start over with --overwrite"):
            run(tmp_path, None)


def test_two_writers_of_one_dataset(tmp_path):
    writer = IndexedWriter(str(tmp_path / "out_text_document"), np.uint16)
    with pytest.raises(DataError, match="another process is writing"):
        run(tmp_path, corpus.english(5))
    writer.discard()
    assert run(tmp_path, corpus.english(5)).documents == 5


def test_two_runs_under_one_prefix(tmp_path):
    """Of different keys, whose datasets do not meet but whose journal and list of broken lines do."""
    with Journal(f"{tmp_path}/out", {}, False), pytest.raises(DataError, match="another process is writing"):
        run(tmp_path, ["x"])
    assert everything_named(tmp_path) == []
    assert run(tmp_path, ["x"]).documents == 1


def test_a_run_that_starts_while_another_one_publishes(tmp_path, monkeypatch):
    """It has opened the unfinished file when that gets its final name and the lock is let go: it must not cut it."""
    prefix, lock = str(tmp_path / "d"), indexed_writer.take_lock
    first = IndexedWriter(prefix, np.uint16)
    first.add(b"\1\0\2\0", np.array([2]))
    first.finish(None)

    def late(*arguments):
        first.publish()
        lock(*arguments)

    monkeypatch.setattr(indexed_writer, "take_lock", late)
    with pytest.raises(DataError, match="another process is writing"):
        IndexedWriter(prefix, np.uint16)
    assert (tmp_path / "d.bin").read_bytes() == b"\1\0\2\0"


DRIVER = """
import sys
sys.path.insert(0, {root!r})
from megatron.data import preprocess
preprocess.JOURNAL_SECONDS = 0.1
from tools import preprocess_data
sys.exit(preprocess_data.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """SIGKILL at different moments: nothing final, no process left, and at last the files of an undisturbed run."""
    corpus.write_jsonl(tmp_path / "in.jsonl.zst", corpus.english(30_000))
    data = corpus.gpt2(tmp_path)
    run(tmp_path, None, name="whole", source="in.jsonl.zst")
    words = ["--input", str(tmp_path / "in.jsonl.zst"), "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    words += [
        "--workers",
        "1",
        "--log-interval",
        "500",
        "--vocab-file",
        data.vocab_file,
        "--merge-file",
        data.merge_file,
    ]
    resumed = []
    for moment in (3, 1, 8, 0):  # lines of progress after which it is killed; 0: not at all
        tool = [sys.executable, "-c", DRIVER.format(root=str(corpus.ROOT)), *words]
        process = subprocess.Popen(tool, stderr=subprocess.PIPE, text=True)
        said = [process.stderr.readline() for _ in range(moment)]
        if moment:
            workers = [int(pid) for pid in children(process.pid)]
            process.send_signal(signal.SIGKILL)
            assert not [name for name in everything_named(tmp_path) if ".incomplete" not in name]
        else:
            said += process.stderr.readlines()
        process.wait()
        process.stderr.close()
        resumed += [int(line.split()[3].replace(",", "")) for line in said if line.startswith("going on after")]
        deadline = time.monotonic() + 30
        while moment and any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "worker processes outlive the killed run"
            time.sleep(0.05)
    assert process.returncode == 0, said
    assert resumed
    assert 0 < resumed[-1] < 30_000
    assert resumed == sorted(resumed)
    assert files(tmp_path) == files(tmp_path, "whole_text_document")
