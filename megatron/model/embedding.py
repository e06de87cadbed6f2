"""What enters the first layer: a vector per token plus a learned vector per position.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

import torch
from torch import nn

from megatron.parallel.groups import ALONE, TensorGroup
from megatron.parallel.tensor_collectives import SEQUENCE, split
from megatron.parallel.tensor_parallel import Dropout, VocabParallelEmbedding


class Embedding(nn.Module):
    """Token and position embeddings, added, with dropout. The token table is also the model's output layer.

    Tensor-parallel processes share the rows of the token table; the position table is replicated.
    """

    def __init__(
        self, vocab_size: int, position_rows: int, hidden_size: int, dropout: float, tensor_group: TensorGroup = ALONE
    ) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(vocab_size, hidden_size, tensor_group)
        self.position_embeddings = nn.Embedding(position_rows, hidden_size)
        self.dropout = Dropout(dropout, tensor_group)
        self.tensor_group = tensor_group

    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Embed ``tokens_BS``; they stand at positions 0, 1, 2 ... unless ``positions_BS`` says otherwise.

        With sequence parallelism the result is this process's piece of the sequence.

        Raises:
            ValueError: more tokens than the position table has rows.
        """
        length, rows = tokens_BS.size(1), self.position_embeddings.num_embeddings
        if positions_BS is not None:
            where = self.position_embeddings(positions_BS)  # (B, S, H)
        elif length <= rows:
            where = self.position_embeddings.weight[:length]  # (S, H)
        else:
            raise ValueError(
                f"a sequence of {length} tokens does not fit the position table of {rows} rows; "
                f"shorten it, or build the model with --max-position-embeddings {length} or more"
            )
        if self.tensor_group.sequence_parallel:
            where = split(where, self.tensor_group, SEQUENCE)
        return self.dropout(self.word_embeddings(tokens_BS) + where)  # (B, S, H)
