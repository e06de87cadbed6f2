#!/usr/bin/env bash
# Everything the project checks, with its own set-up: style, then tests.
#
#   bash tests/run.sh                  all tests that this machine can run
#   bash tests/run.sh --fast           without the slow ones
#   bash tests/run.sh --distributed    only tests/distributed
#   bash tests/run.sh -k router -x     other arguments go to pytest
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
arguments=()
for argument in "$@"; do
    case "$argument" in
        --fast) arguments+=(-m "not slow") ;;
        --distributed) arguments+=(tests/distributed) ;;
        *) arguments+=("$argument") ;;
    esac
done

# shellcheck source=tools/setup_env.sh
source "$root/tools/setup_env.sh"
setup_env dev
cd "$root"
export OMP_NUM_THREADS=1

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -q "${arguments[@]+"${arguments[@]}"}"
