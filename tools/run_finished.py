"""Is a run finished? For scripts that would start it again, so that they need not start anything.

    python tools/run_finished.py FLAGS OF pretrain_gpt_moe.py

Says so and ends with status 0 if the last start of the run in ``--save`` came to the end that these flags ask for
(``--train-tokens``, ``--exit-tokens``) and saved it; with status 1 if not; with status 2 if no run can be started with
these flags, since they are wrong or name no data or no tokenizer. Reads one small file, without torch.
"""

import sys

from megatron.config.flags import parse_args
from megatron.data.corpora import find_corpora
from megatron.data.errors import DataError
from megatron.data.tokenizer import option_problems
from megatron.training.exit_record import finished


def main() -> int:
    """Returns the exit status."""
    config = parse_args()
    said = finished(config)
    if said is not None:
        print(said)
        return 0
    problems = option_problems(config.data)
    try:
        find_corpora(config.data)
    except DataError as error:
        problems.insert(0, str(error))
    print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return 2 if problems else 1


if __name__ == "__main__":
    sys.exit(main())
