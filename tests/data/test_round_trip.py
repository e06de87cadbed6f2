"""Properties: whatever the text, text -> tokens -> files -> text gives it back, and nothing else is in the files."""

import functools
import json
import tempfile
from pathlib import Path

import corpus
import pytest

from megatron.data import preprocess as module
from megatron.data.index_file import read_index
from megatron.data.preprocess import preprocess
from megatron.data.reading import read_batches
from megatron.data.tokenizer import build_tokenizer

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as some  # noqa: E402

texts = some.text(some.characters(exclude_categories=["Cs"]), max_size=60) | some.sampled_from(
    [*corpus.NASTY, *corpus.MARKERS]
)
broken = some.sampled_from([b"{", b"[1]", b'{"other": ""}', b'{"text": 1}', b'{"text": "\xff"}', b"\xff"])
quickly = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {make: make(tmp_path_factory.mktemp(make.__name__)) for make in (corpus.gpt2, corpus.byte_level)}


def documents(prefix: str, tokenizer) -> list[str]:
    """Decoded; each that is not empty must end with the end-of-document token, and have no other."""
    import numpy as np

    index = read_index(prefix)
    tokens = np.fromfile(f"{prefix}.bin", dtype=index.dtype)
    assert len(tokens) == index.tokens
    found, start = [], 0
    for length in index.document_lengths(0, index.documents):
        ids = tokens[start : start + length].tolist()
        assert [place for place, id in enumerate(ids) if id == tokenizer.eod] == ([length - 1] if length else [])
        found.append(tokenizer.decode(ids[:-1]))
        start += length
    return found


@pytest.mark.parametrize("make", [corpus.gpt2, corpus.byte_level])
@quickly
@given(
    records=some.lists(some.tuples(texts, some.booleans()) | broken, min_size=1, max_size=12),
    end=some.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    mark=some.booleans(),
    shards=some.integers(1, 3),
    batch_bytes=some.sampled_from([1, 50, 10**6]),
)
def test_json_lines_come_back(make, tokenizers, records, end, mark, shards, batch_bytes):
    """With any line ends, a byte-order mark, characters escaped or not, in any number of shards and batches."""
    lines = [
        record if isinstance(record, bytes) else json.dumps({"text": record[0]}, ensure_ascii=record[1]).encode()
        for record in [*records, ("never empty", True)]
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_batches", functools.partial(read_batches, batch_bytes=batch_bytes))
        path = Path(folder) / "in.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" * mark + end.join(lines))
        found, rejected = [], 0
        for index in range(shards):
            done = preprocess(
                [str(path)], f"{folder}/out", tokenizers[make], append_eod=True, workers=0, max_rejected=1.0,
                num_shards=shards, shard_index=index,
            )  # fmt: skip
            found += documents(done.prefixes[0], build_tokenizer(tokenizers[make]))
            rejected += done.rejected
        assert found == [record[0] for record in records if not isinstance(record, bytes)] + ["never empty"]
        assert rejected == sum(isinstance(record, bytes) for record in records)


@quickly
@given(text=some.text(some.sampled_from("ab 'st\n\t\r.1é漢\u3000\x85\x1c🙂"), max_size=400))
def test_both_libraries_make_the_same_tokens(tokenizers, text):
    tokenizer = build_tokenizer(tokenizers[corpus.gpt2])
    if tokenizer._fast is None:
        pytest.skip("tiktoken is not installed")
    assert tokenizer.encode_arrays([text])[0].tolist() == tokenizer.encode(text)
