"""What a conversion is to do."""

import dataclasses

TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")
MOE_OPTIONS = ("expert_interval", "topk", "mlp_type", "moe_router_center_input")
UPCYCLING = ("num_experts", *MOE_OPTIONS, "upcycle_noise", "upcycle_seed")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The fields are the flags of tools/convert_checkpoint.py; ``source`` is ``--from`` and ``target`` is ``--to``."""

    load: str | None
    save: str
    target: str
    source: str | None = None
    average: list[str] | None = None
    dtype: str | None = None
    drop_optimizer: bool = False
    gelu_as_tanh: bool = False
    tp: int | None = None
    pp: int | None = None
    ep: list[int] | None = None
    upcycle: bool = False
    num_experts: list[int] | None = None
    expert_interval: int | None = None
    topk: int | None = None
    mlp_type: str | None = None
    moe_router_center_input: bool | None = None
    upcycle_noise: float | None = None
    upcycle_seed: int | None = None
    max_shard_size: str | None = None
    tokenizer_type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_model: str | None = None
    eod_token: str | None = None

    @property
    def tokenizer_options(self) -> dict[str, str]:
        """The tokenizer's flags that were given."""
        names = ("tokenizer_type", *TOKENIZER_FILES, "eod_token")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def layout(self) -> tuple[int, int, list[int]] | None:
        """Tensor-parallel processes, pipeline stages and expert-parallel processes; None if none of them was given."""
        if self.tp is self.pp is self.ep is None:
            return None
        return (1 if self.tp is None else self.tp, 1 if self.pp is None else self.pp, self.ep or [1])
