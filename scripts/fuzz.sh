#!/usr/bin/env bash
# fuzz.sh - fuzzes every parser of outside bytes, or those named, one after the other.
#
# usage: scripts/fuzz.sh [SECONDS] [TARGET...]     (600 seconds each; all targets)
#
# Needs a nightly toolchain and cargo-fuzz (cargo install cargo-fuzz). New inputs are kept in fuzz/corpus,
# findings in fuzz/artifacts. Ends with status 1 at the first finding. docs/fuzzing.md says what is asserted.

set -euo pipefail
cd "$(dirname "$0")/.."

all=(packet datagram_server datagram_client record_batch codec segment recovery snapshot catalog config control keys sst manifest kafka kafka_session)

seconds=600
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    seconds=$1
    shift
fi
(($# > 0)) || set -- "${all[@]}"
for target in "$@"; do
    [[ " ${all[*]} " == *" $target "* ]] || {
        echo "usage: scripts/fuzz.sh [SECONDS] [TARGET...]   (targets: ${all[*]})" >&2
        exit 2
    }
done
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "fuzz.sh: cargo-fuzz or the nightly toolchain is missing; run: rustup toolchain install nightly && cargo install cargo-fuzz" >&2
    exit 2
fi

# The targets of files write them here: in memory, as the log's staging file has to be.
TMPDIR=$(mktemp -d /dev/shm/taffrail-fuzz.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 130' INT TERM
for target in "$@"; do
    echo "== $target, $seconds s"
    mkdir -p "fuzz/corpus/$target"
    # The smallest SST has two pages of 4096 bytes beside its messages.
    [[ $target == sst ]] && longest=32768 || longest=8192
    inputs=("fuzz/corpus/$target")
    # Not every target needs help to begin with.
    [[ ! -d fuzz/seeds/$target ]] || inputs+=("fuzz/seeds/$target")
    nice -n 19 cargo +nightly fuzz run "$target" "${inputs[@]}" -- \
        -max_total_time="$seconds" -max_len="$longest" -timeout=10 -print_final_stats=1 || exit 1
done
