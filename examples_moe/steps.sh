# shellcheck shell=bash
# To be sourced by a script that has "fail" and "out": work in steps that are not done twice.
#
# Each step leaves a stamp that is the checksum of its own command and of every command before it: what is done is not
# done again, and what follows a change is. A step that was interrupted goes on with what it has.
chain=
checksum() { printf '%s\n' "$@" | cksum | tr ' ' -; }
step() { # NAME OUTPUT TITLE COMMAND...: OUTPUT is what to delete before COMMAND starts afresh
    local name=$1 output=$2 title=$3 begin=$SECONDS
    shift 3
    chain="$(checksum "$chain" "$@")"
    if [[ "$(cat "${out:?}/.$name.done" 2>/dev/null)" == "$chain" ]]; then
        printf '== %s: done before\n' "$title"
        return
    fi
    printf '== %s\n' "$title"
    rm -f "${out:?}/.$name.done"
    if [[ "$(cat "${out:?}/.$name.begun" 2>/dev/null)" != "$chain" ]]; then
        [[ -z "$output" ]] || rm -rf "${out:?}/$output"
        printf '%s\n' "$chain" >"${out:?}/.$name.begun"
    fi
    "$@" || fail "this step failed: $title" "its command was: $*" "Mend what it says above and run this script again."
    printf '%s\n' "$chain" >"${out:?}/.$name.done"
    printf '   %d s\n' $((SECONDS - begin))
}
