"""What a checkpoint records of the training data, and how a run goes on with the same or with other data.

The training data are one endless list of sequences. Where a run changes its blend, the list goes on from there with
the new one, and each corpus from where it was. A corpus is known by its content and the documents that are trained on,
never by its path.
"""

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from megatron.data.blend_order import BlendOrder
from megatron.data.corpora import Source
from megatron.data.dataset_checks import document_range, weights_of
from megatron.data.errors import DataError
from megatron.data.index_file import read_index

EPOCHS = "epochs"
"""The order of :class:`megatron.data.shuffled_corpus.ShuffledCorpus`."""
CORE = "megatron-core"
"""The order of megatron.core, which depends on the length of the run; only runs that began with it go on with it."""
_SAME_SHARE = 1e-9
NO_CHANGE_IN_CORE_ORDER = (
    "--change-blend: the run goes on in the order of megatron.core, in which a corpus has no place of its own to go on "
    "from; drop the flag and give the data of the checkpoint, or begin a new run with its weights (--finetune)"
)


@dataclasses.dataclass(frozen=True)
class CorpusState:
    """A corpus of the blend: documents ``first`` to ``last`` - 1 of a dataset."""

    prefix: str
    content: str
    first: int
    last: int
    weight: float
    start: int = 0
    """The sequence of the corpus with which this blend began."""

    @property
    def key(self) -> str:
        """What the corpus is known by."""
        return f"{self.content}:{self.first}-{self.last}"

    def count_tokens(self) -> int:
        """The tokens of these documents, from the .idx."""
        return read_index(self.prefix).sum_lengths(self.first, self.last)

    def __str__(self) -> str:
        return f"{self.prefix} (documents {self.first} to {self.last}, content {self.content[:12]})"


def corpus_states(
    source: Source, contents: Mapping[str, str] | None = None, damaged: Container[str] = ()
) -> list[CorpusState]:
    """The corpora of a set as a new run reads them.

    Args:
        source: the set; its corpora can be opened.
        contents: their digests, by prefix; empty by default, as counts of documents and tokens need none.
        damaged: prefixes to leave out.
    """
    return [
        CorpusState(
            prefix, contents[prefix] if contents else "", *document_range(prefix, source.first, source.last), weight
        )
        for prefix, weight in zip(source.blend.prefixes, weights_of(source.blend), strict=True)
        if prefix not in damaged
    ]


@dataclasses.dataclass(frozen=True)
class DataState:
    """The blend that a run reads, in an order of corpora that does not depend on the command line."""

    seed: int
    corpora: tuple[CorpusState, ...]
    position: int = 0
    """In the list, where this blend began."""
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    """Sequences read of corpora that an earlier blend had and this one does not, by key."""
    order: str = EPOCHS

    @classmethod
    def begin(cls, seed: int, corpora: Sequence[CorpusState]) -> "DataState":
        """That of a new run.

        Raises:
            DataError: two of the corpora are the same.
        """
        by_key: dict[str, CorpusState] = {}
        for corpus in corpora:
            if (other := by_key.setdefault(corpus.key, corpus)) is not corpus:
                raise DataError(
                    f"{other.prefix} and {corpus.prefix} hold the same documents; give one of them, with the sum of "
                    "their weights"
                )
        return cls(seed, tuple(sorted(corpora, key=lambda corpus: corpus.key)))

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, state: dict[str, Any]) -> "DataState":
        """Inverse of :meth:`state`."""
        return cls(**{**state, "corpora": tuple(CorpusState(**corpus) for corpus in state["corpora"])})

    def resumed(self, now: "DataState", position: int, change: bool) -> tuple["DataState", list[str]]:
        """The state of a run that goes on from ``position`` of this one's list with the blend of ``now``.

        Returns:
            The state, and what to tell the user.

        Raises:
            DataError: the blend is another one, and ``change`` is not set.
        """
        differences = self._differences(now)
        if not differences:
            return self._moved(now), []
        if self.order == CORE and change:
            raise DataError(NO_CHANGE_IN_CORE_ORDER)
        if not change:
            change_it = "or --change-blend, to go on with these, each corpus from where the run stands in it; "
            raise DataError(
                "the training data are not those of the checkpoint:\n  " + "\n  ".join(differences) + "\n"
                f"Give the data of the checkpoint; {'' if self.order == CORE else change_it}"
                "or --finetune, to begin a new run with the checkpoint's weights"
            )
        read = dict(self.left)
        counts = BlendOrder([corpus.weight for corpus in self.corpora]).counts(position - self.position)
        for corpus, count in zip(self.corpora, counts, strict=True):
            read[corpus.key] = corpus.start + count
        corpora = tuple(dataclasses.replace(corpus, start=read.pop(corpus.key, 0)) for corpus in now.corpora)
        notes = [f"--change-blend, from sequence {position} of the run on: {line}" for line in differences]
        for corpus in corpora:
            if corpus.start:
                notes.append(f"{corpus.prefix} goes on with its sequence {corpus.start}")
            elif any(key.startswith(f"{corpus.content}:") for key in read):
                notes.append(
                    f"{corpus.prefix} begins with its first sequence: the run read other documents of it (--split), "
                    "and those that are among these as well may be read twice"
                )
            else:
                notes.append(f"{corpus.prefix} begins with its first sequence")
        return DataState(self.seed, corpora, position, read), notes

    def _moved(self, now: "DataState") -> "DataState":
        """The same data, where they lie now."""
        prefixes = {corpus.key: corpus.prefix for corpus in now.corpora}
        corpora = tuple(dataclasses.replace(corpus, prefix=prefixes[corpus.key]) for corpus in self.corpora)
        return dataclasses.replace(self, corpora=corpora)

    def _differences(self, now: "DataState") -> list[str]:
        then_by_key, now_by_key = ({corpus.key: corpus for corpus in each.corpora} for each in (self, now))
        then_total, now_total = (sum(corpus.weight for corpus in each.corpora) for each in (self, now))
        found = [f"not in the checkpoint: {corpus}" for key, corpus in now_by_key.items() if key not in then_by_key]
        found += [f"only in the checkpoint: {corpus}" for key, corpus in then_by_key.items() if key not in now_by_key]
        if found:
            return found
        for key, corpus in now_by_key.items():
            then, share = then_by_key[key].weight / then_total, corpus.weight / now_total
            if not math.isclose(then, share, rel_tol=_SAME_SHARE):
                found.append(f"{corpus.prefix}: share {share:.6g}, in the checkpoint {then:.6g}")
        return found
