"""Perplexity of texts with sliding windows.

A document's tokens t_1 ... t_n are each scored once, given the end-of-document token t_0, which also precedes a
document in training, and as many of t_1 ... t_(i-1) as the window holds:

    loss = -1/n * sum_i log p(t_i | t_max(0, i-c) ... t_(i-1)),    perplexity = exp(loss)

over all documents together. A window has at most L tokens of input and each window after a document's first one scores
``stride`` further tokens, so every token but those at the beginning has a context of at least L - stride + 1 tokens.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from megatron.data.dataset_checks import damage_problems, open_problems, tokenizer_problems
from megatron.data.errors import DataError
from megatron.data.identity import identify_alone, vocabulary_problems
from megatron.data.index_file import map_tokens, read_index
from megatron.data.inputs import find_inputs, spans_of
from megatron.data.jsonl import record_texts
from megatron.data.reading import read_batches
from megatron.data.tokenizer import Tokenizer
from megatron.evaluation.processes import Processes
from megatron.evaluation.scoring import score
from megatron.model.gpt import GPTModel


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens without any end-of-document token, and the size of the text that they encode."""

    tokens: Sequence[int]
    words: int  # between white space
    bytes: int  # in UTF-8


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sums over all documents; the logarithm is the natural one."""

    documents: int
    tokens: int
    words: int
    bytes: int
    nll: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token."""
        return self.nll / self.tokens

    def report(self) -> dict[str, float | int | None]:
        """All figures by name; None for what is not defined (no word, no byte) or is beyond the largest float."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "loss": self.loss,
            "token_perplexity": self._perplexity(self.tokens),
            "word_perplexity": self._perplexity(self.words),
            "bits_per_byte": self.nll / math.log(2) / self.bytes if self.bytes else None,
        }

    def _perplexity(self, units: int) -> float | None:
        """exp(nll / units). Text without white space has words of hundreds of tokens, each of which is unlikely."""
        try:
            return math.exp(self.nll / units) if units else None
        except OverflowError:
            return None


def windows(tokens: Sequence[int], longest: int, stride: int) -> Iterator[tuple[Sequence[int], int]]:
    """Cut ``tokens``, of which the first one is only context, into windows: tokens, and how many at their end to score.

    Args:
        tokens: t_0 ... t_n.
        longest: tokens of input, L; a window has one more.
        stride: tokens that a window after the first one scores, from 1 to L.
    """
    end = min(longest, len(tokens) - 1)
    scored = end
    while scored > 0:
        yield tokens[max(0, end - longest) : end + 1], scored
        scored = min(stride, len(tokens) - 1 - end)
        end += scored


def measure(
    model: GPTModel,
    documents: Iterable[Document],
    begin: int,
    *,
    stride: int,
    longest: int | None = None,
    batch_size: int = 8,
    processes: Processes | None = None,
) -> Perplexity:
    """Measure; all processes give the same documents and get the same answer.

    Args:
        model: in evaluation mode; dropping no token.
        documents: at least one token in all.
        begin: the token before a document: the end-of-document token, or the model's own that begins a text.
        stride: see :func:`windows`.
        longest: tokens of input; the model's positions by default.
        batch_size: windows of one forward pass of one process.
        processes: who shares the work.

    Raises:
        ValueError: sizes that do not fit the model, nothing to score, or logits that are not finite.
    """
    processes, positions = processes or Processes(), model.config.position_rows
    longest = longest or positions
    if longest > positions:
        raise ValueError(f"--max-length {longest}: the model has {positions} positions")
    if not 1 <= stride <= longest:
        raise ValueError(f"--stride {stride}: expected 1 to {longest}, the length of a window")
    sums = {"documents": 0, "tokens": 0, "words": 0, "bytes": 0}

    def cut() -> Iterator[tuple[Sequence[int], int]]:
        for document in documents:
            sums["documents"] += 1
            for name, count in (("tokens", len(document.tokens)), ("words", document.words), ("bytes", document.bytes)):
                sums[name] += count
            yield from windows([begin, *document.tokens], longest, stride)

    nll, rounds = 0.0, iter(cut())
    with tqdm(desc="perplexity", unit=" tokens", unit_scale=True, disable=processes.rank > 0) as bar:
        while turn := list(itertools.islice(rounds, batch_size * processes.size)):
            idle = [([begin, begin], 0)]  # peers with other experts need this process in each forward pass
            mine = turn[processes.rank :: processes.size] or idle
            failure, found = None, []
            try:
                found = score(model, *zip(*mine, strict=True))
            except ValueError as error:
                failure = str(error)
            failed = next(filter(None, processes.gather(failure)), None)
            if failed:
                raise ValueError(failed)
            nll -= math.fsum(itertools.chain.from_iterable(each.log_probabilities for each in found))
            bar.update(sum(count for _, count in turn))
    if not sums["tokens"]:
        raise ValueError("there is no token to score; give a text that is not empty")
    return Perplexity(**sums, nll=math.fsum(processes.gather(nll)))


def documents_of_files(inputs: Sequence[str], key: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents of .jsonl, .txt (a file is a document) and .parquet files, also compressed ones.

    Raises:
        DataError: a file is not there, or a line is broken; it is named.
    """
    for batch in read_batches(spans_of(find_inputs(inputs), by_line=False), (key,)):
        for number, record in enumerate(batch.records, batch.first):
            try:
                texts = record_texts(record, batch.kind, (key,), number == 1)
            except (ValueError, DataError) as error:
                raise DataError(f"{batch.span.path}, record {number}: {error}") from None
            for text in texts or ():
                yield _document(text, tokenizer)


def documents_of_dataset(prefix: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents of PREFIX.bin and PREFIX.idx; their text is found by decoding.

    Raises:
        DataError: it cannot be opened, or its tokens are not this tokenizer's.
    """
    problems = open_problems(prefix) or damage_problems(prefix) or tokenizer_problems(prefix, tokenizer)
    if problems := problems or vocabulary_problems(prefix, identify_alone(prefix), tokenizer):
        raise DataError("; ".join(problems))
    index = read_index(prefix)
    data, end = map_tokens(prefix, index), 0
    for length in index.document_lengths(0, index.documents).tolist():
        start, end = end, end + length
        tokens = data[start:end].tolist()
        while tokens and tokens[-1] == tokenizer.eod:
            tokens.pop()
        text = tokenizer.decode(tokens)
        yield Document(tokens, len(text.split()), len(text.encode()))


def _document(text: str, tokenizer: Tokenizer) -> Document:
    return Document(tokenizer.encode(text), len(text.split()), len(text.encode()))


def to_json(found: Perplexity, **setting: object) -> str:
    """The figures and how they were obtained."""
    return json.dumps(found.report() | {"setting": setting}, indent=1) + "\n"
