# shellcheck shell=bash
# To be sourced: finds or makes the Python environment that the scripts of this repository run in.
#
#   source tools/setup_env.sh
#   setup_env plot              # the package and its [plot] extra; several extras: plot,dev
#   "$PYTHON" tools/...         # PYTHON is set, its folder is first on PATH, PYTHONPATH holds this checkout
#
# Which environment, first that applies:
#   1. the active one (VIRTUAL_ENV, or CONDA_PREFIX other than conda's base); what is installed there stays as it is,
#      above all its torch, and only what is missing is added;
#   2. .venv in this checkout, where it is there already;
#   3. python3 as it is, when it has every requirement already (a container image, say);
#   4. a new .venv in this checkout, with the versions of constraints.txt.
# Nothing is installed when setup.py, constraints.txt and the packages of megatron/ are as they were last time.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_setup_fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

_python_is_new_enough() { # PYTHON
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

_find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && _python_is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    _setup_fail "Python 3.10 or newer is needed; 'python3' is $(python3 --version 2>&1 || true)." \
        "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or activate an environment that has one."
}

_requirements_met() { # PYTHON EXTRAS
    "$1" "$REPOSITORY/tools/check_requirements.py" --extras "$2" >/dev/null 2>&1
}

_fingerprint() { # PYTHON: what an installation depends on
    (cd "$REPOSITORY" && "$1" -c '
import hashlib, pathlib
files = [pathlib.Path("setup.py"), pathlib.Path("constraints.txt")]
packages = sorted(str(path) for path in pathlib.Path("megatron").glob("*/__init__.py"))
print(hashlib.sha256(b"".join(path.read_bytes() for path in files) + repr(packages).encode()).hexdigest())')
}

_run_pip() { # LOG ARGUMENTS...: pip with its output in LOG; on a terminal, one line that says what it is at
    local log=$1 line
    shift
    "$PYTHON" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 | while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        if [[ -t 2 ]]; then printf '\r\033[K  %.76s' "$line" >&2; fi
    done
    local status=${PIPESTATUS[0]}
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    return "$status"
}

_install_cpu_torch() { # LOG: without an NVIDIA GPU, spare the gigabytes of CUDA libraries of PyPI's Linux wheel
    local version
    if [[ "$(uname -s)" != Linux ]] || command -v nvidia-smi >/dev/null; then return; fi
    if "$PYTHON" -c 'import torch' 2>/dev/null; then return; fi
    version="$(sed -n 's/^torch==//p' "$REPOSITORY/constraints.txt")+cpu"
    _run_pip "$1" "torch==$version" ||
        _run_pip "$1" --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version" ||
        printf '  no CPU-only wheel of torch found: installing the one with CUDA, several gigabytes\n' >&2
}

_install() { # EXTRAS CONSTRAINTS NAME
    local log
    log="$(mktemp "${TMPDIR:-/tmp}/megatron-moe-setup.XXXXXX")"
    printf 'Installing the package with [%s] into %s (log: %s)\n' "$1" "$3" "$log" >&2
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >>"$log" 2>&1 ||
        _setup_fail "$PYTHON has no pip and ensurepip could not add it; install pip there and run this again."
    _install_cpu_torch "$log"
    if ! _run_pip "$log" -c "$2" -e "${REPOSITORY}[$1]"; then
        tail -n 15 "$log" >&2
        _setup_fail "pip could not install the package into $3; the end of its output is above, all of it in $log." \
            "Without a network? Install the requirements of setup.py by other means into an environment, activate it and" \
            "run this again: nothing is installed where nothing is missing."
    fi
    rm -f "$log"
}

setup_env() { # EXTRAS
    local extras=$1 name prefix constraints stamp
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        prefix=$VIRTUAL_ENV
    elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
        prefix=$CONDA_PREFIX
    fi
    if [[ -n "${prefix:-}" && "$prefix" != "$REPOSITORY/.venv" ]]; then
        PYTHON="$prefix/bin/python"
        [[ -x "$PYTHON" ]] || _setup_fail "the active environment $prefix has no bin/python; deactivate it or activate another."
        _python_is_new_enough "$PYTHON" ||
            _setup_fail "Python 3.10 or newer is needed; the active environment $prefix has $("$PYTHON" --version 2>&1)."
        if ! _requirements_met "$PYTHON" "$extras"; then
            constraints="$(mktemp "${TMPDIR:-/tmp}/megatron-moe-constraints.XXXXXX")"
            "$PYTHON" "$REPOSITORY/tools/check_requirements.py" --write-constraints "$constraints" >/dev/null || true
            _install "$extras" "$constraints" "$prefix"
            rm -f "$constraints"
        fi
    else
        PYTHON="$REPOSITORY/.venv/bin/python"
        stamp="$REPOSITORY/.venv/.megatron-moe-stamp"
        if ! "$PYTHON" -c '' 2>/dev/null; then
            name="$(_find_python)" || exit 1
            if _requirements_met "$name" "$extras"; then
                PYTHON=$name
                stamp=
            else
                "$name" -m venv --clear "$REPOSITORY/.venv" >&2 ||
                    _setup_fail "$name could not make a virtual environment." \
                        "Debian, Ubuntu: apt-get install python3-venv; or activate an environment of your own."
            fi
        fi
        if [[ -n "$stamp" ]] && { [[ "$(cat "$stamp" 2>/dev/null)" != "$(_fingerprint "$PYTHON")" ]] ||
            ! _requirements_met "$PYTHON" "$extras"; }; then
            _install "$extras" "$REPOSITORY/constraints.txt" "$REPOSITORY/.venv"
            _fingerprint "$PYTHON" >"$stamp"
        fi
    fi
    PATH="$(dirname "$PYTHON"):$PATH"
    PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHON PATH PYTHONPATH
}
