"""Which samples a rank reads, in which order: that follows from how many the run has consumed, and nothing else."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from megatron.data.errors import DataError


class MicroBatchSampler(Sampler[list[int]]):
    """The micro-batches of one data-parallel rank.

    Sample i of a run is fixed. An update that starts after c samples with a global batch of g sequences takes samples
    [c, c + g); its micro-batch m is [c + m * mbs, c + (m + 1) * mbs), and rank r takes those with m % dp_size == r.

    As every global batch is a multiple of mbs * dp_size, counting m from the start of the update or from the start of
    this sampler gives the same ranks, so the sampler need not know g: a batch ramp-up only changes how many
    micro-batches the trainer takes for one update. For the same reason a run resumes with another micro-batch size or
    another number of ranks simply by counting anew from ``consumed_samples``, be that a multiple of mbs * dp_size or
    not: the updates still take the same samples.

    Args:
        num_samples: samples of the dataset. A rest too small to give every rank a whole micro-batch is left out, so
            that all ranks yield equally often.
        micro_batch_size: samples of one micro-batch.
        dp_rank: this data-parallel rank.
        dp_size: data-parallel ranks.
        consumed_samples: samples of all ranks that are done; the sampler starts with this one.

    Raises:
        DataError: a number is out of range.
    """

    def __init__(
        self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int, consumed_samples: int = 0
    ) -> None:
        if micro_batch_size < 1:
            raise DataError(f"micro_batch_size is {micro_batch_size}, expected at least 1")
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank is {dp_rank}, expected 0 <= dp_rank < dp_size = {dp_size}")
        if consumed_samples < 0 or num_samples < 0:
            raise DataError(f"consumed_samples {consumed_samples} and num_samples {num_samples} must not be negative")
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.start = consumed_samples
        self._rounds = max(num_samples - consumed_samples, 0) // (micro_batch_size * dp_size)

    def __len__(self) -> int:
        return self._rounds

    def __iter__(self) -> Iterator[list[int]]:
        for round_ in range(self._rounds):
            first = self.start + (round_ * self.dp_size + self.dp_rank) * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))
