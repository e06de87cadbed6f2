"""Our models as lm-evaluation-harness sees them: log-likelihoods and greedy text of many requests."""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron.data.tokenizer import Tokenizer
from megatron.evaluation.processes import Processes
from megatron.evaluation.request_log import RequestLog, key_of
from megatron.evaluation.scoring import score
from megatron.inference.generate import stream
from megatron.inference.sampling import Sampling
from megatron.inference.special_tokens import SpecialTokens, special_tokens
from megatron.model.gpt import GPTModel

LONGEST_TEXT = 256  # tokens that a task generates which names no length; as lm-eval's own models
Item = tuple[str, Any, int]  # key, what to compute it from, tokens


class HarnessLM(TemplateLM):
    """A model in evaluation mode, with its tokenizer.

    Every process gets every request, and every process returns every answer. Batches are cut from the requests sorted
    by length, so they do not depend on the number of processes nor on what was finished before; process r computes
    every ``size``-th of them. Texts are not searched for special tokens, and none is added.

    Args:
        model: in evaluation mode; dropping no token.
        tokenizer: the one it was trained with.
        batch_size: sequences of one forward pass.
        processes: who shares the work.
        log: where finished requests are kept; used by process 0 only.
        special: what begins and ends a text; by default the tokenizer's end-of-document token.
    """

    def __init__(
        self,
        model: GPTModel,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        processes: Processes | None = None,
        log: RequestLog | None = None,
        *,
        special: SpecialTokens | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self._special = special or special_tokens({}, tokenizer)
        self.model, self._tokenizer, self.batch_size = model, tokenizer, batch_size
        self.processes = processes or Processes()
        self._log = log
        self._answers: dict[str, Any] = self.processes.from_first(log.answers if log else {})
        self._progress = progress and self.processes.rank == 0
        self._device = model.embedding.word_embeddings.weight.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._special.begin

    @property
    def max_length(self) -> int:
        """Tokens that the model has positions for."""
        return self.model.config.position_rows

    @property
    def max_gen_toks(self) -> int:
        """Longest continuation of a task that names none."""
        return LONGEST_TEXT

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids."""
        return self._tokenizer.encode(string)

    # --------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is what greedy decoding gives) of each request."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._progress)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for about, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored; expected 1 "
                    f"to {self.max_length} after at least 1: {about}"
                )
        items = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            items.append((key_of("score", ids, len(continuation)), (ids, len(continuation)), len(ids)))

        def work(batch: Sequence[Any]) -> list[Any]:
            batch = batch or [([0, 0], 1)]  # a process without work still serves its experts
            scores = score(self.model, [ids for ids, _ in batch], [count for _, count in batch])
            return [(sum(s.log_probabilities), s.greedy) for s in scores]

        return [(total, greedy) for total, greedy in self._run(items, work, "log-likelihoods")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, its first token after the end-of-document token.

        Texts longer than the model are cut into windows, the last of which reaches back for a full context.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            mine = [(None, *make_disjoint_window(pair)) for pair in cut]
            windows += mine
            counts.append(len(mine))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(total for total, _ in itertools.islice(found, count)) for count in counts]

    # ---------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text behind each context, up to a stop sequence, the end-of-document token or the longest length."""
        groups: dict[str, list[int]] = {}
        arguments: list[tuple[Any, ...]] = [request.args for request in requests]
        for number, (_, options) in enumerate(arguments):
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            found = self._generate([arguments[number][0] for number in numbers], arguments[numbers[0]][1])
            texts |= dict(zip(numbers, found, strict=True))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        kwargs: dict[str, Any] = {**normalize_gen_kwargs(options, self.max_gen_toks)}
        count, eod = kwargs["max_gen_toks"], self.eot_token_id
        if not 0 < count < self.max_length:
            raise ValueError(
                f"{count} new tokens leave no room for a prompt in the model's {self.max_length} positions; "
                f"use --max-gen-toks {self.max_length // 2}, for example"
            )
        stop = handle_stop_sequences(list(kwargs.get("until") or []), eos=self._tokenizer.decode([eod]))
        sampling = Sampling(kwargs["temperature"], int(kwargs.get("top_k", 0)), float(kwargs.get("top_p", 1.0)))
        items = []
        for number, context in enumerate(contexts):
            ids = self.tok_encode(context)[-(self.max_length - count) :] or [self._special.begin]
            seed = 0 if sampling.greedy else number
            items.append((key_of("generate", ids, options, seed), (ids, seed), len(ids)))

        def work(batch: Sequence[Any]) -> list[str]:
            prompts, seeds = zip(*(batch or [([eod], 0)]), strict=True)
            return self._continue(prompts, seeds, sampling, count, stop)

        return self._run(items, work, "texts")

    def _continue(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, count: int, stop: list[str]
    ) -> list[str]:
        ends, together = self._special.ends, self.processes.expert_parallel > 1
        new: list[list[int]] = [[] for _ in prompts]
        texts = ["" for _ in prompts]
        running = set(range(len(prompts)))
        steps = stream(
            self.model, prompts, count, sampling, seeds=seeds, eod=None, vocab_size=self._tokenizer.vocab_size
        )
        for step in steps:
            for number in sorted(running):
                token = step[number]
                if token is None or token in ends:
                    running.remove(number)
                    continue
                new[number].append(token)
                texts[number] = self._tokenizer.decode(new[number])
                if any(term and term in texts[number] for term in stop):
                    running.remove(number)
            if not (self.processes.any(bool(running)) if together else running):
                break
        return [postprocess_generated_text(text, stop, None) for text in texts]

    # ------------------------------------------------------------------------------------------------- batches

    def _run(self, items: list[Item], work: Callable[[Sequence[Any]], list[Any]], what: str) -> list[Any]:
        """The answer of each item. ``work`` gets a batch, or nothing where this process only serves its experts."""
        unique = {key: (key, payload, length) for key, payload, length in items}
        order = sorted(unique.values(), key=lambda item: (-item[2], item[0]))
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        left = [batch for batch in batches if any(key not in self._answers for key, _, _ in batch)]
        rank, size = self.processes.rank, self.processes.size
        done = len(order) - sum(map(len, left))
        pace = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a job's log gets a line of them now and then
        with tqdm(
            total=len(order), initial=done, desc=what, unit="", mininterval=pace, disable=not self._progress
        ) as bar:
            for at in range(0, len(left), size):
                mine = left[at + rank] if at + rank < len(left) else []
                answers: dict[str, Any] = {}
                if mine or self.processes.expert_parallel > 1:
                    found = work([payload for _, payload, _ in mine])
                    answers = {key: answer for (key, _, _), answer in zip(mine, found, strict=False)}
                together: dict[str, Any] = {}
                for part in self.processes.gather(answers):
                    together |= part
                self._answers |= together
                if self._log is not None and rank == 0:
                    self._log.add(together)
                bar.update(len(together))
        return [self._answers[key] for key, _, _ in items]

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results file."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        dtype: torch.dtype = self.model.embedding.word_embeddings.weight.dtype
        return {"model_num_parameters_on_process_0": count, "model_dtype": str(dtype)}
