#!/usr/bin/env bash
# Everything the project checks, with its own set-up: style, then tests.
#
#   bash tests/run.sh                  all tests that this machine can run, but for those of which there are many alike
#   bash tests/run.sh --all            these too
#   bash tests/run.sh --fast           without the slow ones
#   bash tests/run.sh --distributed    only tests/distributed, with the whole matrix of parallel layouts
#   bash tests/run.sh --slurm          only tests/slurm: the launch scripts as jobs of a SLURM cluster that they start here;
#                                      needs root and SLURM's programs (bash tests/slurm/cluster.sh install)
#   bash tests/run.sh --transformers   only exported models with the oldest and the newest transformers, in environments
#                                      .venv-transformers-* that pip makes (about 300 MB)
#   bash tests/run.sh -k router -x     other arguments go to pytest
#
# Two workers of pytest-xdist share the tests (tests/conftest.py says how); -n 0 makes it one process.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
arguments=()
selection=(-m "not exhaustive and not slurm and not transformers_releases")
workers=(-n 2 --dist loadscope)
for argument in "$@"; do
    case "$argument" in
        --all) selection=() ;;
        --fast) selection=(-m "not slow and not exhaustive and not slurm and not transformers_releases") ;;
        --distributed) selection=() && arguments+=(tests/distributed) ;;
        --slurm) selection=() && workers=() && arguments+=(tests/slurm) ;;
        --transformers) selection=(-m transformers_releases) && workers=(-n 0) ;;
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
exec "$PYTHON" -m pytest -q "${workers[@]+"${workers[@]}"}" "${selection[@]+"${selection[@]}"}" "${arguments[@]+"${arguments[@]}"}"
