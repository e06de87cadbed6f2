"""torchrun, except that what it prints last of a run that fails is one line, and no traceback of its own.

python tools/torchrun.py FLAGS OF torchrun
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main

NAMED = 4  # ranks


def summary(failures: dict[int, ProcessFailure]) -> str:
    """How the ranks of this node ended, by rank."""
    words = []
    for rank, failure in sorted(failures.items())[:NAMED]:
        status = failure.exitcode
        how = f"ended with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"
        words.append(f"rank {rank} (process {failure.pid}) {how}")
    if len(failures) > NAMED:
        words.append(f"and {len(failures) - NAMED} others failed")
    return f"error: the run failed: {', '.join(words)}; the reason stands above, in a line that begins with 'error'"


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        print(summary(error.failures), file=sys.stderr)
        sys.exit(1)
    except SignalException as error:
        print(f"ended by {error.sigval.name}", file=sys.stderr)
        sys.exit(128 + error.sigval)
