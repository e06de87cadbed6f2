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
# Without arguments and with --all, types are checked too (python -m basedpyright does only that), beside the tests.
#
# Two workers of pytest-xdist share the tests (tests/conftest.py says how); -n 0 makes it one process.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
arguments=()
selection=(-m "not exhaustive and not slurm and not transformers_releases")
workers=(-n 2 --dist loadscope)
types=yes
for argument in "$@"; do
    [[ "$argument" == --all ]] || types=
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
if [[ -n "$types" ]]; then
    found="$(mktemp)"
    nice "$PYTHON" -m basedpyright --pythonpath "$PYTHON" >"$found" 2>&1 &
    checker=$!
    trap 'kill "$checker" 2>/dev/null || true; rm -f "$found"' EXIT
fi
status=0
"$PYTHON" -m pytest -q "${workers[@]+"${workers[@]}"}" "${selection[@]+"${selection[@]}"}" "${arguments[@]+"${arguments[@]}"}" || status=$?
if [[ -n "$types" ]] && ! wait "$checker"; then
    cat "$found"
    echo "error: the types above are wrong; see [tool.basedpyright] in pyproject.toml" >&2
    status=1
fi
exit "$status"
