"""Continue prompts, one token at a time, with cached keys and values.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.inference.kv_cache import KVCache
from megatron.inference.sampling import Sampling, next_tokens
from megatron.model.gpt import GPTModel

# Without cuDNN, which takes 2 ms a layer to plan for each new length, and here every step has a new one.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seeds: Sequence[int] | None = None,
    eod: int | Collection[int] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, all at once; the arguments are those of :func:`stream`."""
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, sampling, seeds=seeds, eod=eod, vocab_size=vocab_size):
        for tokens, token in zip(new, step, strict=True):
            if token is not None:
                tokens.append(token)
    return new


@torch.inference_mode()
def stream(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seeds: Sequence[int] | None = None,
    eod: int | Collection[int] | None = None,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt as soon as it is known; None once a sequence has ended.

    What a prompt becomes does not depend on the prompts beside it (in an MoE model, as long as evaluation drops no
    token, which is the default). The model computes in evaluation mode; its own mode comes back at the end.

    Args:
        model: on any one device.
        prompts: token ids; lengths may differ.
        max_new_tokens: steps at most.
        sampling: how tokens are chosen; plain sampling by default.
        seeds: one for each prompt, by default 0, 1, 2 ...
        eod: the token that ends a sequence, or several of which each does; it is not part of the output.
        vocab_size: ids from here on are padding of the token table and never chosen.

    Raises:
        ValueError: an empty prompt, unusable arguments, more tokens than the model has positions for, or a model whose
            logits are not finite.
    """
    sampling = sampling or Sampling()
    seeds = range(len(prompts)) if seeds is None else seeds
    ends = frozenset(eod if isinstance(eod, Collection) else () if eod is None else (eod,))
    _check(model, prompts, max_new_tokens, seeds, vocab_size)
    device = model.embedding.word_embeddings.weight.device
    uniform_BS = torch.stack([torch.rand(max_new_tokens, generator=_generator(seed)) for seed in seeds]).to(device)
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache.for_model(model, len(prompts), max(lengths) + max_new_tokens)
    tokens_BS = torch.tensor([list(prompt) + [0] * (max(lengths) - len(prompt)) for prompt in prompts], device=device)
    last_B = torch.tensor(lengths, device=device) - 1
    running = [True] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            with sdpa_kernel(BACKENDS):
                x_BSH, _ = model.hidden_states(tokens_BS, cache)
            if step == 0:
                cache.truncate(lengths)
            logits_BV = model.head(x_BSH[torch.arange(len(prompts), device=device), last_B])[:, :vocab_size]
            if not bool(logits_BV.isfinite().all()):
                raise ValueError("the model's logits are not finite; its weights are damaged or its training diverged")
            tokens_BS = next_tokens(logits_BV, sampling, uniform_BS[:, step])[:, None]
            last_B = torch.zeros_like(last_B)
            chosen = tokens_BS[:, 0].tolist()
            running = [on and token not in ends for on, token in zip(running, chosen, strict=True)]
            if not any(running):
                return
            yield [token if on else None for on, token in zip(running, chosen, strict=True)]
    finally:
        model.train(was_training)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check(
    model: GPTModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int], vocab_size: int | None
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens; give each at least one (the end-of-document token starts a text)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; expected one for each")
    limit = model.vocab_size if vocab_size is None else vocab_size
    if not 0 < limit <= model.vocab_size:
        raise ValueError(f"vocab_size is {limit}, but the model's token table has {model.vocab_size} rows")
    wrong = [token for prompt in prompts for token in prompt if not 0 <= token < limit]
    if wrong:
        raise ValueError(
            f"token {wrong[0]} in a prompt is outside the vocabulary of {limit} tokens; is it the same tokenizer?"
        )
