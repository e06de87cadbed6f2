"""Token ids outside of the vocabulary end a run; they are never looked up or scored as if they were others."""

import torch


def check_ids(ids: torch.Tensor, rows: int) -> None:
    """Raise if an id is not below ``rows``, the size of the whole token table, or is negative.

    Raises:
        IndexError: on a CPU, naming the id. On a GPU the host does not wait to find out: a kernel asserts, and
            a RuntimeError follows at whatever waits for the GPU next.
    """
    if ids.is_cuda:
        right = ((ids >= 0) & (ids < rows)).all()
        torch._assert_async(right, f"a token id is not from 0 to {rows - 1}, the rows of the token table")
    elif ids.device.type == "cpu" and ids.numel():
        lowest, highest = (int(x) for x in torch.aminmax(ids))
        if lowest < 0 or highest >= rows:
            wrong = lowest if lowest < 0 else highest
            raise IndexError(
                f"got token id {wrong}; expected 0 to {rows - 1}, the rows of the token table. Give the tokenizer that"
                " the data was made with"
            )
