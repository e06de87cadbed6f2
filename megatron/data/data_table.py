"""What the data of a run are, in a table: for the trainer's start and for the plan of a run that is not started.

Only the .idx files are read: 100 million documents take a second.
"""

from collections.abc import Iterable, Sequence

from megatron.config import RunConfig
from megatron.data.corpora import Source, find_corpora, missing_files
from megatron.data.data_state import CorpusState, DataState, corpus_states

_Row = tuple[str, ...]
_HEADER = ("data", "documents", "tokens", "sequences", "share", "read", "epochs")


def data_table(config: RunConfig, samples: int, state: DataState | None = None) -> str:
    """Documents, tokens and sequences of each corpus, and how much is read of it.

    "read" is the number of sequences: of training data in the whole run, of other sets at each validation or, for test
    sets, at the end; "epochs" is how often that reads the corpus.

    Args:
        config: of the run; the files of its data are there.
        samples: sequences that the whole run trains on.
        state: of the training data of a run that has begun, which may have changed its blend.

    Raises:
        DataError: a dataset cannot be read.
    """
    corpora, seq_length = find_corpora(config.data), config.model.seq_length
    training = corpus_states(corpora.train) if state is None else _as_given(state.corpora, corpora.train)
    rows: list[_Row] = [_HEADER, ("training",)]
    rows += _rows(training, samples - (0 if state is None else state.position), seq_length)
    held_out = config.training.eval_samples
    validated = corpora.valid if config.training.eval_interval else {}
    rows.append((f"validation, every {config.training.eval_interval} updates" if validated else "no validation",))
    for name, source in validated.items():
        rows += _rows(corpus_states(source), held_out, seq_length, "" if name == "valid" else f"{name}: ")
    if corpora.test:
        rows.append(("test, at the end of training",))
    for name, source in corpora.test.items():
        rows += _rows(corpus_states(source), held_out, seq_length, "" if name == "test" else f"{name}: ")
    return _aligned(rows)


def planned_data_table(config: RunConfig, samples: int) -> str:
    """:func:`data_table` of a run that may be planned where its data are not; which files are missing, if they are."""
    if missing := [file for prefix in find_corpora(config.data).prefixes() for file in missing_files(prefix)]:
        return f"data: not looked at, since there is no {', '.join(missing)}"
    return data_table(config, samples)


def _as_given(corpora: Iterable[CorpusState], source: Source) -> list[CorpusState]:
    """Corpora in the order of the command line."""
    return sorted(corpora, key=lambda corpus: source.blend.prefixes.index(corpus.prefix))


def _rows(corpora: Iterable[CorpusState], samples: int, seq_length: int, name: str = "") -> list[_Row]:
    """A row for each corpus of a blend of which ``samples`` sequences are read."""
    corpora, rows = list(corpora), []
    total = sum(corpus.weight for corpus in corpora)
    for corpus in corpora:
        tokens = corpus.count_tokens()
        sequences, share = max(tokens - 1, 0) // seq_length, corpus.weight / total
        read = corpus.start + share * samples
        epochs = f"{read / sequences:.2f}" if sequences else "-"
        numbers = (corpus.last - corpus.first, tokens, sequences)
        rows.append((f"  {name}{corpus.prefix}", *(f"{n:,}" for n in numbers), f"{share:.1%}", f"{read:,.0f}", epochs))
    return rows


def _aligned(rows: Sequence[_Row]) -> str:
    """Names to the left, numbers to the right; a row of one word is a heading."""
    table = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=False))
        lines.append(f"{name:<{widths[0]}}{numbers}" if cells else name)
    return "\n".join(lines)
