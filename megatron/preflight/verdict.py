"""From what all ranks have found to what is broken, what is slow, and a table of the nodes."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from megatron.preflight.facts import Facts
from megatron.preflight.speed import LinkSpeeds

SLOW = 0.8
"""Share of the median, of all GPUs or nodes, below which one counts as slow."""
SLOW_CPU = 0.25
"""The same on CPUs, whose cores serve others too."""
SKEW = 1.0  # s that a clock may be off
_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Need:
    """What a run writes into ``--save``."""

    checkpoint: float  # bytes of one
    more: int  # checkpoints that it will have there beyond those that are
    keeps_few: bool  # and deletes older ones: ``more`` is what it cannot do without


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found. ``broken`` keeps a run from going well, ``slow`` makes it longer, ``notes`` are for the user."""

    table: str
    broken: list[str]
    slow: list[str]
    notes: list[str]

    @property
    def words(self) -> str:
        """All of it."""
        lines = [f"broken: {each}" for each in self.broken] + [f"slow: {each}" for each in self.slow]
        lines += [f"note: {each}" for each in self.notes]
        return "\n".join(["preflight:", self.table, *lines] + ([] if self.broken or self.slow else ["all is well"]))


def find_verdict(everyone: Sequence[Facts], need: Need | None, *, on_gpu: bool) -> Verdict:
    """What follows from the facts of all ranks, in the order of ranks."""
    nodes: dict[int, list[Facts]] = {}
    for facts in everyone:
        nodes.setdefault(facts.node, []).append(facts)
    broken = [f"{facts.name}: {problem}" for facts in everyone for problem in facts.problems]
    broken += _unequal_versions(everyone) + _unequal_devices(everyone)
    broken += _skewed(nodes) + _unequal_data(nodes)
    notes: list[str] = []
    _room(nodes, need, broken, notes)
    share = SLOW if on_gpu else SLOW_CPU
    slow = _slow(
        {facts.name: facts.tflops for facts in everyone if facts.computes}, share, "matrix products at {} TFLOP/s"
    )
    for kind in ("all_reduce", "all_to_all"):
        words = kind.replace("_", "-")
        inside = {_name(ranks): _least(ranks, kind) for ranks in nodes.values()}
        slow += _slow(_known(inside), share, f"{words} inside the node at {{}} GB/s")
        between = {_name(ranks): _best_pair(ranks, kind) for ranks in nodes.values()}
        if len(nodes) > 2:
            slow += _slow(_known(between), share, f"{words} with any other node at {{}} GB/s")
    return Verdict(_table(nodes, broken, slow), broken, slow, notes)


def _name(ranks: Sequence[Facts]) -> str:
    return f"node {ranks[0].node} (host {ranks[0].host})"


def _known(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _slow(values: dict[str, float], share: float, words: str) -> list[str]:
    """Those below ``share`` of the median."""
    if len(values) < 2:
        return []
    median = statistics.median(values.values())
    return [
        f"{name}: {words.format(f'{value:.3g}')}, less than {share:.0%} of the median {median:.3g}"
        for name, value in values.items()
        if value < share * median
    ]


def _least(ranks: Sequence[Facts], kind: str) -> float | None:
    return min((getattr(facts.inside, kind) for facts in ranks if facts.inside is not None), default=None)


def _best_pair(ranks: Sequence[Facts], kind: str) -> float | None:
    """Of a node's pairs the fastest; a pair is as fast as its slowest rank."""
    pairs: dict[int, float] = {}
    for facts in ranks:
        for other, links in facts.pairs.items():
            pairs[other] = min(pairs.get(other, float("inf")), getattr(links, kind))
    return max(pairs.values(), default=None)


def _unequal(everyone: Sequence[Facts], what: str, value_of: Callable[[Facts], str | None]) -> list[str]:
    """Who differs from the most common value."""
    values = {facts.rank: value_of(facts) for facts in everyone}
    usual, _ = Counter(values.values()).most_common(1)[0]
    return [
        f"{facts.name}: {what} {values[facts.rank] or 'missing'}, others have {usual or 'none'}"
        for facts in everyone
        if values[facts.rank] != usual
    ]


def _unequal_versions(everyone: Sequence[Facts]) -> list[str]:
    names = list(dict.fromkeys(name for facts in everyone for name in facts.versions))
    return [line for name in names for line in _unequal(everyone, name, lambda facts, n=name: facts.versions.get(n))]


def _unequal_devices(everyone: Sequence[Facts]) -> list[str]:
    return _unequal(everyone, "device", lambda facts: facts.device)


def _skewed(nodes: dict[int, list[Facts]]) -> list[str]:
    return [
        f"{_name(ranks)}: its clock is {abs(off):.3g} s {'ahead of' if off > 0 else 'behind'} the others'"
        for ranks in nodes.values()
        if abs(off := min((facts.clock for facts in ranks), key=abs)) > SKEW
    ]


def _unequal_data(nodes: dict[int, list[Facts]]) -> list[str]:
    firsts = [ranks[0] for ranks in nodes.values()]
    files = list(dict.fromkeys(file for facts in firsts for file in facts.data))
    problems = []
    for file in files:
        having = [facts for facts in firsts if file in facts.data]  # a missing file is reported elsewhere
        problems += _unequal(having, f"{file} of bytes", lambda facts, f=file: str(facts.data.get(f)))
    return problems


def _room(nodes: dict[int, list[Facts]], need: Need | None, broken: list[str], notes: list[str]) -> None:
    """Compare the space that is free with what the run writes."""
    if need is None:
        return
    size = need.checkpoint / _GB
    for ranks in nodes.values():
        free = ranks[0].disk_free
        if free is None:
            continue
        least = need.more if need.keeps_few else 1
        if free < least * need.checkpoint:
            more = f"{least} checkpoints of {size:.3g} GB are" if least > 1 else f"a checkpoint of {size:.3g} GB is"
            broken.append(f"{_name(ranks)}: {free / _GB:.3g} GB free in --save, and {more} to be written there")
    free_first = next(iter(nodes.values()))[0].disk_free
    if free_first is not None and need.checkpoint <= free_first < need.more * need.checkpoint and not need.keeps_few:
        notes.append(
            f"--save has room for {int(free_first // need.checkpoint)} of the {need.more} checkpoints of {size:.3g} GB "
            "that the run will write; --keep-last N deletes old ones"
        )


def _table(nodes: dict[int, list[Facts]], broken: Sequence[str], slow: Sequence[str]) -> str:
    """One row a node."""
    rows: list[tuple[str, ...]] = [
        (
            *("node", "host", "ranks", "device", "TFLOP/s", "inside: reduce", "exchange", "pairs: reduce", "exchange"),
            *("clock ms", "free GB", "verdict"),
        )
    ]
    for node, ranks in nodes.items():
        first = ranks[0]
        names = (_name(ranks), *(facts.name for facts in ranks))
        mine = [
            word
            for word, lines in (("BROKEN", broken), ("SLOW", slow))
            if any(line.startswith(f"{name}: ") for line in lines for name in names)
        ]
        rows.append(
            (
                str(node), first.host, _span([facts.rank for facts in ranks]), first.device,
                _number(min(facts.tflops for facts in ranks)),
                *(_number(_least(ranks, kind)) for kind in ("all_reduce", "all_to_all")),
                *(_number(_best_pair(ranks, kind)) for kind in ("all_reduce", "all_to_all")),
                f"{1e3 * min((facts.clock for facts in ranks), key=abs):+.1f}",
                "-" if first.disk_free is None else f"{first.disk_free / _GB:,.0f}",
                " ".join(mine) or "ok",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    everywhere = [facts.everywhere for ranks in nodes.values() for facts in ranks if facts.everywhere is not None]
    if everywhere:
        slowest = LinkSpeeds(min(e.all_reduce for e in everywhere), min(e.all_to_all for e in everywhere))
        lines.append(
            f"  all nodes together: all-reduce {slowest.all_reduce:.3g} GB/s, all-to-all {slowest.all_to_all:.3g} GB/s"
        )
    return "\n".join(lines)


def _span(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
