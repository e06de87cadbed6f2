"""Text that grows token by token."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from megatron.data.tokenizer import Tokenizer
from megatron.inference.generate import stream
from megatron.inference.sampling import Sampling
from megatron.model.gpt import GPTModel

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextChunk(NamedTuple):
    """A bit more of one continuation."""

    number: int  # of the prompt
    text: str  # may be empty
    tokens: list[int]
    ended: str | None  # "eod": by a token that ends it; "length": by the limit; None: more follows


def stream_text(
    model: GPTModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    ends: Collection[int] | None = None,
) -> Iterator[TextChunk]:
    """Continue all ``prompts`` together; yields each one's text as it comes, and its end exactly once.

    Arguments and errors are those of :func:`megatron.inference.generate.stream`; any token of ``ends``, by default the
    tokenizer's end-of-document token, ends a text.
    """
    texts = [TextStream(tokenizer, prompt) for prompt in prompts]
    running = set(range(len(prompts)))
    steps = stream(
        model,
        prompts,
        max_new_tokens,
        sampling,
        seeds=seeds,
        eod=tokenizer.eod if ends is None else ends,
        vocab_size=tokenizer.vocab_size,
    )
    for step in steps:
        for number in sorted(running):
            token = step[number]
            if token is None:
                running.remove(number)
                yield TextChunk(number, texts[number].finish(), [], "eod")
            else:
                yield TextChunk(number, texts[number].add(token), [token], None)
    for number in sorted(running):
        ended = "length" if len(texts[number].tokens) == max_new_tokens else "eod"
        yield TextChunk(number, texts[number].finish(), [], ended)


class TextStream:
    """Turns the tokens behind a prompt into pieces of text, each as soon as it is certain.

    A token may hold only a part of a character; that part waits for the rest. The pieces, joined, are what the tokens
    decode to behind the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._prompt_length = len(tokenizer.decode(self._prompt))
        self._given = 0

    def add(self, token: int) -> str:
        """Take one more token; returns the new text that is certain now, perhaps none."""
        self.tokens.append(token)
        return self._advance(self._text().rstrip(REPLACEMENT))

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._advance(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._prompt + self.tokens)[self._prompt_length :]

    def _advance(self, text: str) -> str:
        piece = text[self._given :]
        self._given += len(piece)
        return piece
