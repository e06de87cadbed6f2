"""Keys and values of the tokens a model has already seen, so that a new token costs one token's work.

Shapes: B batch, S new tokens, M slots in use, N heads, D head size.
"""

from collections.abc import Sequence

import torch

from megatron.model.gpt import GPTModel


class KVCache:
    """Preallocated keys and values of every layer, [B, N, max_length, D] each, for sequences of unequal lengths.

    Slot m of a sequence holds its token at position m. A batch of prompts is therefore padded at the end, not at the
    front: causal attention keeps padding out of every real token, and :meth:`truncate` then forgets it, so that the
    next token of each sequence overwrites it.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_length: int,
        head_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch, num_heads, max_length, head_size)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows_B1 = torch.arange(batch, device=device)[:, None]
        self._lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._used = 0  # the longest sequence; known without asking the device
        self._positions_BS: torch.Tensor | None = None
        self._mask_B1SM: torch.Tensor | None = None

    @classmethod
    def for_model(cls, model: GPTModel, batch: int, max_length: int) -> "KVCache":
        """An empty cache for ``batch`` sequences of at most ``max_length`` tokens.

        Raises:
            ValueError: the position table of the model is shorter than ``max_length``.
        """
        config, weight = model.config, model.embedding.word_embeddings.weight
        if max_length > config.position_rows:
            raise ValueError(
                f"sequences of {max_length} tokens do not fit the position table of {config.position_rows} rows; "
                "shorten the prompt or generate fewer tokens"
            )
        heads = config.num_attention_heads
        size = config.hidden_size // heads
        return cls(config.num_layers, batch, heads, max_length, size, dtype=weight.dtype, device=weight.device)

    @property
    def max_length(self) -> int:
        """Slots of a sequence."""
        return self._keys.size(3)

    @property
    def lengths_B(self) -> torch.Tensor:
        """Tokens of each sequence, int64 [B]."""
        return self._lengths_B

    def begin(self, count: int) -> torch.Tensor:
        """Make room for ``count`` new tokens of each sequence; returns their positions, int64 [B, count].

        Raises:
            ValueError: a sequence would grow beyond ``max_length``.
        """
        if self._used + count > self.max_length:
            raise ValueError(
                f"{count} tokens after the {self._used} in the cache need {self._used + count} slots; "
                f"it was made with max_length {self.max_length}"
            )
        device = self._lengths_B.device
        self._positions_BS = self._lengths_B[:, None] + torch.arange(count, device=device)
        started = self._used > 0
        self._used += count
        self._lengths_B = self._lengths_B + count
        slots_M = torch.arange(self._used, device=device)
        self._mask_B1SM = (slots_M <= self._positions_BS[..., None])[:, None] if started else None
        return self._positions_BS

    def append(
        self, layer: int, k_BNSD: torch.Tensor, v_BNSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store one layer's keys and values of the tokens announced to :meth:`begin`.

        Returns:
            All keys and all values so far, [B, N, M, D], and the mask, bool [B, 1, S, M], True where a new token may
            look; None when the cache was empty before and plain causal attention is right.
        """
        self._keys[layer][self._rows_B1, :, self._positions_BS] = k_BNSD.transpose(1, 2)  # (B, S, N, D)
        self._values[layer][self._rows_B1, :, self._positions_BS] = v_BNSD.transpose(1, 2)
        return self._keys[layer, :, :, : self._used], self._values[layer, :, :, : self._used], self._mask_B1SM

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what sequence b holds beyond its first ``lengths[b]`` tokens."""
        self._lengths_B = torch.tensor(lengths, dtype=torch.int64, device=self._lengths_B.device)
        self._used = max(lengths)
