#!/usr/bin/env bash
# What the bar scripts share: a scratch folder that goes away, medians, and the last line.
# Source it from the checkout's root.

set -euo pipefail

TAFFRAIL=${TAFFRAIL:-$PWD/target/release/taffrail}

# shellcheck source=scripts/lib.sh
. scripts/lib.sh
die() { echo "$(basename "$0"): $*" >&2; exit 2; }

[[ -x $TAFFRAIL ]] || die "no $TAFFRAIL: run scripts/demo.sh once, or cargo build --release"

SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/taffrail-bar.XXXXXX")
declare -a UNDO=("rm -rf '$SCRATCH'")
undo() {
    local i
    set +e
    for ((i = ${#UNDO[@]} - 1; i >= 0; i--)); do eval "${UNDO[i]}"; done 2>/dev/null
}
trap undo EXIT
trap 'exit 130' INT TERM

# Reserves 2 MiB hugepages so that at least $1 MiB are free; gives back what it added.
need_hugepages() {
    UNDO+=("restore_hugepages")
    reserve_hugepages "$1"
}

# The median of the numbers given.
median() { printf '%s\n' "$@" | sort -g | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

# verdict NAME FIGURE BAR [at-most]: prints the last line; the exit status says whether the bar holds.
verdict() {
    echo "$1 $2 (bar $3)"
    awk -v f="$2" -v b="$3" -v most="${4:-}" 'BEGIN { exit !(most == "" ? f >= b : f <= b) }'
}

# Takes the files of a folder out of the page cache; other programs' pages stay.
forget() {
    sync -f "$1"
    find "$1" -type f -exec dd if={} iflag=nocache count=0 status=none \;
}

# built NAME CARGO-COMMAND...: builds, and prints the path of the program of that name. The command is to have --message-format=json.
built() {
    local name=$1 path
    shift
    command -v jq >/dev/null || die "needs jq (apt-get install jq)"
    path=$("$@" | jq -r --arg name "$name" 'select(.executable != null and .target.name == $name) | .executable' | tail -n 1)
    [[ -x $path ]] || die "cargo built no '$name'"
    echo "$path"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || die "waited too long for: $*"
        sleep 0.1
    done
}
