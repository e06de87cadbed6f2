"""What enters the first layer: a vector per token plus a learned vector per position.

Shapes: B batch, S sequence, H hidden, V vocabulary (padded).
"""

import torch
from torch import nn

from megatron.config import ModelConfig
from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.tensor_collectives import SEQUENCE, split
from megatron.parallel.tensor_parallel import Dropout, VocabParallelEmbedding


class Embedding(nn.Module):
    """Token and position embeddings, added, with dropout. The token table is also the model's output layer.

    Tensor-parallel processes share the rows of the token table; the position table is replicated.

    Args:
        model: its shape.
        vocab_size: rows of the token table.
        tensor_group: the processes that share the token table.
        only_table: leave out all but the token table, for a pipeline stage that has the head and not the embedding.
    """

    def __init__(
        self, model: ModelConfig, vocab_size: int, tensor_group: TensorGroup = ALONE, *, only_table: bool = False
    ) -> None:
        super().__init__()
        self.tensor_group = tensor_group
        self.word_embeddings = VocabParallelEmbedding(vocab_size, model.hidden_size, tensor_group)
        if not only_table:
            self.position_embeddings = nn.Embedding(model.position_rows, model.hidden_size)
            self.dropout = Dropout(model.hidden_dropout, tensor_group)

    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Embed ``tokens_BS``; at positions 0, 1, 2 ... unless ``positions_BS`` says otherwise.

        With sequence parallelism the result is this process's piece of the sequence.

        Raises:
            ValueError: more tokens than the position table has rows.
        """
        length, rows = tokens_BS.size(1), self.position_embeddings.num_embeddings
        if positions_BS is not None:
            position_BSH = self.position_embeddings(positions_BS)
        elif length <= rows:
            position_BSH = self.position_embeddings.weight[:length]  # (S, H), the same for each sequence
        else:
            raise ValueError(
                f"a sequence of {length} tokens does not fit the position table of {rows} rows; "
                f"shorten it, or build the model with --max-position-embeddings {length} or more"
            )
        if self.tensor_group.sequence_parallel:
            position_BSH = split(position_BSH, self.tensor_group, SEQUENCE)
        return self.dropout(self.word_embeddings(tokens_BS) + position_BSH)
