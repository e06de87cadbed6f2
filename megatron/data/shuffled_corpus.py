"""One corpus, or a split of it, as an endless list of sequences.

Shapes: D documents of an epoch, N sequences of an epoch, S tokens of a sequence.

An epoch reads each document once. Its documents are shuffled and joined, the tokens cut into N = floor((T - 1) / S)
sequences of S + 1 (the last token of one is the first of the next), and the sequences shuffled. No sequence has tokens
of two epochs: a rest of fewer than S tokens is left out, some before the first sequence and some after the last. How
many is drawn for each epoch, so what one epoch leaves out another reads.

All that is drawn comes from (seed, content of the corpus, epoch). So the list is the same for every run, whatever its
length, batch size and layout: a longer run begins with what a shorter one reads.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.errors import DataError
from megatron.data.index_cache import array_path, fill
from megatron.data.index_file import map_tokens, read_index

_ORDER = 1
"""Version of the order; part of the name in the cache."""
_SEQUENCES_OF_A_FILE = 1 << 16
"""Epochs of a small corpus share a file."""
_MOST_EPOCHS = 1000
_NAMES = ("documents", "sequences")


@dataclasses.dataclass(frozen=True)
class ShuffledCorpus:
    """Sequences 0, 1, 2, … of the documents ``first`` to ``last`` - 1 of a dataset.

    A document is here what the .idx calls a sequence, as in Megatron-LM: ours have one each.
    """

    prefix: str
    content: str
    """See :class:`megatron.data.identity.Identity`."""
    first: int
    last: int
    tokens: int
    """T, of these documents."""
    seq_length: int
    """S"""
    seed: int
    vocab_size: int
    cache: str
    """Folder of the index."""

    @property
    def sequences(self) -> int:
        """N"""
        return (self.tokens - 1) // self.seq_length

    def prepare(self, start: int, end: int) -> None:
        """Compute what the cache lacks to read sequences ``start`` to ``end`` - 1.

        Raises:
            DataError: it cannot be written, or the corpus would be read absurdly often.
        """
        if end <= start:
            return
        if end > _MOST_EPOCHS * self.sequences:
            raise DataError(
                f"{self.prefix}: the run would read its {self.tokens} tokens {end // self.sequences} times, expected "
                f"{_MOST_EPOCHS} at most; give more data or a smaller --train-tokens"
            )
        of_a_file = self._epochs_of_a_file * self.sequences
        for file in range(start // of_a_file, (end - 1) // of_a_file + 1):
            fill(Path(self.cache), self._base(file), _NAMES, lambda file=file: self._build(file))

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [S + 1]: tokens, of which the last is only a label.

        Raises:
            DataError: one of them is not in the vocabulary, or the index is not in the cache.
        """
        epoch, position = divmod(index, self.sequences)
        file, row = divmod(epoch, self._epochs_of_a_file)
        documents, sequences = self._open(file)
        lengths, offsets, data = self._dataset()
        at, start = (int(number) for number in sequences[row, position])
        tokens, filled = np.empty(self.seq_length + 1, np.int64), 0
        while filled < len(tokens):
            document = documents[row, at]
            taken = min(int(lengths[document]) - start, len(tokens) - filled)
            begin = int(offsets[document]) // data.dtype.itemsize + start
            tokens[filled : filled + taken] = data[begin : begin + taken]
            filled, at, start = filled + taken, at + 1, 0
        if not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise DataError(
                f"{self.prefix}: sequence {position} of epoch {epoch} holds token {tokens.max()} or {tokens.min()}, "
                f"expected 0 to {self.vocab_size - 1}; the .bin has changed since the run began"
            )
        return tokens

    @property
    def _epochs_of_a_file(self) -> int:
        return -(-_SEQUENCES_OF_A_FILE // self.sequences)

    def _base(self, file: int) -> str:
        key = json.dumps([_ORDER, self.content, self.first, self.last, self.seq_length, self.seed])
        return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}-{file}"

    def _build(self, file: int) -> dict[str, np.ndarray]:
        """``documents`` [epochs, D], numbers in the .idx; ``sequences`` [epochs, N, 2], for each the position in
        ``documents`` where it begins and the first token there."""
        lengths = read_index(self.prefix).lengths[self.first : self.last]
        number_type = np.int32 if self.last <= np.iinfo(np.int32).max else np.int64
        epochs = self._epochs_of_a_file
        documents = np.empty((epochs, len(lengths)), number_type)
        sequences = np.empty((epochs, self.sequences, 2), number_type)
        for row in range(epochs):
            draw = self._generator(file * epochs + row)
            order = draw.permutation(len(lengths))
            ends = np.cumsum(lengths[order], dtype=np.int64)
            left_out = draw.randint((self.tokens - 1) % self.seq_length + 1)
            starts = left_out + np.arange(self.sequences, dtype=np.int64) * self.seq_length
            at = np.searchsorted(ends, starts, side="right")
            shuffled = draw.permutation(self.sequences)
            documents[row] = order
            documents[row] += self.first
            sequences[row, :, 0] = at[shuffled]
            sequences[row, :, 1] = (starts - ends[at] + lengths[order[at]])[shuffled]
        return {"documents": documents, "sequences": sequences}

    def _generator(self, epoch: int) -> np.random.RandomState:
        """numpy promises that the streams of this one, unlike those of newer ones, never change."""
        digest = hashlib.sha256(json.dumps([self.seed, self.content, epoch]).encode()).digest()
        return np.random.RandomState(np.frombuffer(digest, "<u4"))

    # Maps are opened when they are first needed, in each process; a pickled corpus is small.

    def _open(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        maps: dict[int, tuple[np.ndarray, np.ndarray]] = self.__dict__.setdefault("_maps", {})
        if file not in maps:
            paths = [array_path(Path(self.cache), self._base(file), name) for name in _NAMES]
            try:
                maps[file] = _plain(np.load(paths[0], mmap_mode="r")), _plain(np.load(paths[1], mmap_mode="r"))
            except OSError as error:
                raise DataError(
                    f"the sample index that rank 0 wrote cannot be read: {error}. --data-cache-path must be on a file "
                    "system that all nodes share, and stay there while the run lasts"
                ) from error
        return maps[file]

    def _dataset(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if "_mapped" not in self.__dict__:
            index = read_index(self.prefix)
            data = map_tokens(self.prefix, index)
            self.__dict__["_mapped"] = _plain(index.lengths), _plain(index.offsets), _plain(data)
        return self.__dict__["_mapped"]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _plain(mapped: np.ndarray) -> np.ndarray:
    """The same memory; numpy takes longer to cut pieces from a memmap."""
    return mapped.view(np.ndarray)
