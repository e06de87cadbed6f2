"""Which corpus each sequence of a blend is taken from.

Sequence j of corpus d, which has the share w_d, is due at time (j + 1/2) / w_d, and sequences are read as they are due.
After any n of them each corpus has been read about w_d n times. The list is endless and depends on nothing but the
shares, so a longer run begins with what a shorter one reads. Nothing is stored: the list is computed in blocks.
"""

from collections.abc import Sequence

import numpy as np

_BLOCK = 1 << 16  # units of time, in each of which one sequence is due


class BlendOrder:
    """The endless list of a blend.

    Args:
        weights: of the corpora, above 0; only their ratios count.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(weights)
        self._shares = np.array([weight / total for weight in weights])
        self._block: tuple[int, int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The corpus that ``position`` of the list is taken from, and which of its sequences this is."""
        first, corpora, sequences = self._block_with(position)
        return int(corpora[position - first]), int(sequences[position - first])

    def counts(self, positions: int) -> list[int]:
        """How many of the first ``positions`` are taken from each corpus."""
        first, corpora, _ = self._block_with(positions)
        number = self._block[0]  # type: ignore[index] # set by _block_with
        taken = np.bincount(corpora[: positions - first], minlength=len(self._shares))
        return (self._due(number) + taken).tolist()

    def _due(self, block: int) -> np.ndarray:
        """Sequences of each corpus that are due before ``block`` begins."""
        return np.maximum(np.ceil(block * _BLOCK * self._shares - 0.5), 0).astype(np.int64)

    def _block_with(self, position: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The first position of the block in which ``position`` lies, corpora and sequences of its positions."""
        if self._block is None or not 0 <= position - self._block[1] < len(self._block[2]):
            number = position // _BLOCK
            while position < self._due(number).sum():
                number -= 1
            while position >= self._due(number + 1).sum():
                number += 1
            before, after = self._due(number), self._due(number + 1)
            corpora = np.repeat(np.arange(len(self._shares)), after - before)
            sequences = np.concatenate([np.arange(*bounds) for bounds in zip(before, after, strict=True)])
            order = np.argsort((sequences + 0.5) / self._shares[corpora], kind="stable")
            self._block = number, int(before.sum()), corpora[order], sequences[order]
        return self._block[1:]
