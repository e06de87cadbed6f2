"""A random choice of a corpus's texts, for training a tokenizer."""

import contextlib
import heapq
import random
from collections.abc import Sequence

from megatron.data.errors import DataError
from megatron.data.inputs import find_inputs, spans_of
from megatron.data.jsonl import record_texts
from megatron.data.progress import ProgressBar
from megatron.data.reading import read_batches


def sample_texts(inputs: Sequence[str], key: str, most_bytes: int, seed: int) -> list[str]:
    """A uniform choice of texts of ``most_bytes`` or somewhat less, read in one pass and in their order.

    Every text that is not empty draws a random number; those with the smallest stay. Broken records are left to
    tools/preprocess_data.py to report. On a terminal a bar shows how far reading is.

    Raises:
        DataError: the inputs are wrong, or there is no text.
    """
    if most_bytes < 1:
        raise DataError(f"--sample-bytes {most_bytes}: expected 1 or more, such as 10M")
    spans = spans_of(find_inputs(inputs))
    draw = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap whose top has the largest draw
    size, count = 0, 0
    with ProgressBar(sum(span.size for span in spans), log_interval=0) as bar:
        for batch in read_batches(spans, (key,)):
            texts = []
            for number, record in enumerate(batch.records, start=batch.first):
                with contextlib.suppress(DataError):
                    texts += record_texts(record, batch.kind, (key,), first=number == 1) or []
            for text in filter(None, texts):
                heapq.heappush(kept, (-draw.random(), count, text))
                count += 1
                size += len(text.encode())
                while size > most_bytes and len(kept) > 1:
                    size -= len(heapq.heappop(kept)[2].encode())
            bar.update(batch.consumed, len(texts), sum(map(len, texts)), 0)
    if not kept:
        raise DataError(f"--input: no document has text under the key {key!r}; name the right --json-key")
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]
