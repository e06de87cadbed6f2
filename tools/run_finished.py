"""Is a run finished? For scripts that would start it again, so that they need not start anything.

    python tools/run_finished.py FLAGS OF pretrain_gpt_moe.py

Says so and ends with status 0 if the last start of the run in ``--save`` came to the end that these flags ask for
(``--train-tokens``, ``--exit-tokens``) and saved it; otherwise ends with status 1. Reads one small file, without torch.
"""

import sys

from megatron.config.flags import parse_args
from megatron.training.exit_record import finished

if __name__ == "__main__":
    said = finished(parse_args())
    if said is None:
        sys.exit(1)
    print(said)
