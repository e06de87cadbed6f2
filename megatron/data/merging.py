"""Several datasets into one, and one into several: whole .bin/.idx each, verified, with a manifest."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from megatron.data import manifest
from megatron.data.corpora import parse_split
from megatron.data.dataset_checks import SPLITS
from megatron.data.errors import DataError
from megatron.data.files import check_prefix, sha256
from megatron.data.index_file import CHUNK, Index, index_problems, read_index
from megatron.data.indexed_writer import IndexedWriter, check_free
from megatron.data.progress import ProgressBar


@dataclasses.dataclass(frozen=True)
class _MergeInput:
    prefix: str
    index: Index
    facts: manifest.DatasetManifest | None

    @property
    def shard(self) -> dict[str, int] | None:
        return self.facts.shard if self.facts else None


@dataclasses.dataclass(frozen=True)
class Written:
    """A dataset that was made."""

    prefix: str
    documents: int
    tokens: int
    existing: bool = False
    """It was made of the same datasets before, and there was nothing to do."""


def merge(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> Written:
    """Write all documents of ``prefixes``, one dataset after another, as the dataset ``output``.

    Shards of one corpus are put into their order, whatever the order of ``prefixes``; all of them must be there.

    Raises:
        DataError: a dataset is missing or damaged, the tokenizers or types of tokens differ, or a shard is missing.
    """
    check_prefix(output)
    if len(prefixes) < 2:
        raise DataError(f"{len(prefixes)} dataset(s) to merge; give two or more prefixes, or a pattern for them")
    places = [os.path.realpath(f"{prefix}.idx") for prefix in prefixes]
    if twice := sorted({prefix for prefix, place in zip(prefixes, places, strict=True) if places.count(place) > 1}):
        raise DataError(f"{', '.join(twice)} would be merged more than once")
    sources = _ordered([_open(prefix) for prefix in prefixes])
    _check_alike(sources)
    facts = _merged_facts(sources)
    if facts and not overwrite and (found := _existing(output, facts)):
        return found
    return _write(output, sources, [(0, source.index.documents) for source in sources], facts, overwrite)


def split(prefix: str, output: str, shares: str, *, overwrite: bool = False) -> list[Written]:
    """Cut ``prefix`` into ``OUTPUT_train``, ``OUTPUT_valid`` and ``OUTPUT_test``, where training with --split cuts.

    Args:
        prefix: the dataset.
        output: beginning of the names.
        shares: as of --split, such as ``98,1,1``; a share of 0 makes no dataset.
        overwrite: whether existing datasets may be replaced. Those that were cut in the same way before are left as
            they are, so that a run that was stopped can be started again.

    Raises:
        DataError: the dataset is missing or damaged, or a share leaves no document.
    """
    check_prefix(output)
    source = _open(prefix)
    expected = source.facts.checksums.get("bin") if source.facts else None
    if expected and sha256(f"{prefix}.bin") != expected:
        raise DataError(_changed(prefix, "bin"))
    cuts, start = [], 0.0
    for name, share in zip(SPLITS, parse_split(shares), strict=True):
        first, last = (_document_at(source.index, bound) for bound in (start, start + share))
        start += share
        if share and first == last:
            raise DataError(f"--split {shares} leaves no document for {name}: {prefix} has {source.index.documents}")
        if share:
            cuts.append((name, first, last))
    parts = []
    for name, first, last in cuts:
        facts, target = None, f"{output}_{name}"
        if source.facts:
            command = manifest.digest([source.facts.checksums, first, last])
            made_from = [f"{prefix}[{first}:{last}]"]
            facts = dataclasses.replace(source.facts, made_from=made_from, shard=None, command=command)
        made = _existing(target, facts) if facts and not overwrite else None
        if not overwrite and not made:
            check_free(target)
        parts.append((made, target, (first, last), facts))
    return [made or _write(target, [source], [documents], facts, overwrite) for made, target, documents, facts in parts]


def _document_at(index: Index, share: float) -> int:
    """The document with which this share of the sequences ends; training cuts between sequences, as empty documents
    have none."""
    sequences = round(share * float(len(index.lengths)))
    return index.documents if sequences == len(index.lengths) else int(np.searchsorted(index.ends, sequences))


def _open(prefix: str) -> _MergeInput:
    source = _MergeInput(prefix, read_index(prefix), manifest.read(prefix))
    if problems := index_problems(source.index):
        raise DataError(f"{prefix}: {'; '.join(problems)}")
    expected = source.facts.checksums.get("idx") if source.facts else None
    if expected and sha256(f"{prefix}.idx") != expected:
        raise DataError(_changed(prefix, "idx"))
    return source


def _changed(prefix: str, what: str) -> str:
    return f"{prefix}.{what} is not the file that its manifest speaks of; tools/inspect_dataset.py --verify says more"


def _ordered(sources: list[_MergeInput]) -> list[_MergeInput]:
    """Shards of one corpus in their order; datasets that are no shards as they are."""
    first = next((source for source in sources if source.shard), None)
    if first is None or first.shard is None:
        return sources
    count, placed = first.shard["count"], {}
    for source in sources:
        if source.shard is None or source.shard["count"] != count:
            what = f"one of {source.shard['count']} shards" if source.shard else "no shard"
            raise DataError(f"{first.prefix} is one of {count} shards, {source.prefix} is {what}; {_ONE_CORPUS}")
        if source.facts.command != first.facts.command:  # type: ignore[union-attr] - shards have facts
            raise DataError(
                f"{first.prefix} and {source.prefix} are shards of different inputs or flags; {_ONE_CORPUS}, or make "
                "the older shards anew"
            )
        placed[source.shard["index"]] = source
    if missing := sorted(set(range(count)) - set(placed)):
        raise DataError(f"these are {len(sources)} of {count} shards; missing: {', '.join(map(str, missing))}")
    if len(sources) > count:
        raise DataError(f"{len(sources)} datasets say that they are one of {count} shards: they are not of one corpus")
    return [placed[index] for index in range(count)]


_ONE_CORPUS = "merge the shards of one corpus at a time"


def _check_alike(sources: list[_MergeInput]) -> None:
    problems = []
    first = sources[0]
    for source in sources[1:]:
        if source.index.dtype != first.index.dtype:
            problems.append(
                f"{source.prefix} has tokens of type {source.index.dtype}, {first.prefix} {first.index.dtype}"
            )
    known = [source for source in sources if source.facts]
    for source in known[1:]:
        ours, theirs = (entry.facts.tokenizer for entry in (known[0], source))  # type: ignore[union-attr]
        if ours["fingerprint"] != theirs["fingerprint"]:
            problems.append(
                f"{source.prefix} was made with {theirs['kind']} {theirs['fingerprint'][:12]}, {known[0].prefix} with "
                f"{ours['kind']} {ours['fingerprint'][:12]}"
            )
        if known[0].facts.append_eod != source.facts.append_eod:  # type: ignore[union-attr]
            problems.append(f"only one of {known[0].prefix} and {source.prefix} was made with --append-eod")
    if problems:
        raise DataError("these datasets do not go together:\n  " + "\n  ".join(problems))


def _merged_facts(sources: list[_MergeInput]) -> manifest.DatasetManifest | None:
    """None where a dataset has no manifest: what is not known of a part is not known of the whole."""
    facts = [source.facts for source in sources if source.facts]
    if len(facts) < len(sources):
        return None
    keys = dict.fromkeys(part.json_key for part in facts)
    return dataclasses.replace(
        facts[0],
        json_key=", ".join(keys),
        rejected=sum(part.rejected for part in facts),
        inputs=[entry for part in facts for entry in part.inputs],
        shard=None,
        command=manifest.digest([part.checksums for part in facts]),
        made_from=[source.prefix for source in sources],
    )


def _existing(output: str, facts: manifest.DatasetManifest) -> Written | None:
    """The dataset ``output``, if it is there and was merged from these very datasets."""
    try:
        read_index(output)
        found = manifest.read(output)
    except DataError:
        return None
    same = found is not None and (found.command, found.made_from) == (facts.command, facts.made_from)
    return Written(output, found.documents, found.tokens, existing=True) if found and same else None


def _write(
    output: str,
    sources: Sequence[_MergeInput],
    ranges: Sequence[tuple[int, int]],
    facts: manifest.DatasetManifest | None,
    overwrite: bool,
) -> Written:
    writer = IndexedWriter(output, sources[0].index.dtype.type, overwrite)
    total = sum(last - first for first, last in ranges)
    try:
        with ProgressBar(total, 0, unit="docs") as bar:
            for source, (first, last) in zip(sources, ranges, strict=True):
                for tokens, lengths, ends in _pieces(source, first, last):
                    writer.add_sequences(tokens, lengths, ends)
                    bar.update(writer.documents, len(ends), len(tokens), 0)
        if facts:
            facts = dataclasses.replace(
                facts, documents=writer.documents, tokens=writer.tokens, dtype=writer.dtype.name,
                versions=manifest.versions(), checksums={}, format=manifest.FORMAT,
            )  # fmt: skip
        writer.finish(facts)
    except BaseException:
        writer.discard()
        raise
    writer.publish()
    return Written(output, writer.documents, writer.tokens)


def _pieces(source: _MergeInput, first: int, last: int) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """Tokens, lengths of sequences and ends of documents ``[first, last)``, some at a time."""
    index, digest = source.index, hashlib.sha256()
    expected = source.facts.checksums.get("bin") if source.facts and last - first == index.documents else None
    with open(f"{source.prefix}.bin", "rb") as file:
        while first < last:
            ends = np.array(index.ends[first : min(first + CHUNK // 16, last) + 1])
            lengths = np.array(index.lengths[ends[0] : ends[-1]])
            sums = np.cumsum(lengths, dtype=np.int64)
            # as many documents as hold no more than CHUNK tokens, but at least one
            tokens_before = np.concatenate([[0], sums])[ends - ends[0]]
            count = max(int(np.searchsorted(tokens_before, CHUNK, side="right")) - 1, 1)
            sequences = int(ends[count] - ends[0])
            size = int(tokens_before[count]) * index.dtype.itemsize
            if sequences:
                file.seek(int(index.offsets[ends[0]]))
            data = file.read(size)
            if len(data) != size:
                raise DataError(f"{source.prefix}.bin ended early: it was changed while it was read")
            digest.update(data)
            yield data, lengths[:sequences], ends[1 : count + 1] - ends[0]
            first += count
    if expected and digest.hexdigest() != expected:
        raise DataError(_changed(source.prefix, "bin"))
