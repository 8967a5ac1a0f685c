#!/usr/bin/env bash
# store-model.sh - sequences of appends, flushes, merges, compaction by key, clean stops and kills between any two steps on the
# file system, that leave the store as a model in memory says (src/storage/lsm/tests.rs, `what_is_durable_is_read_whatever_happens`).
#
# Runs them in chunks, JOBS at a time: a sequence takes some 0.1 s of CPU and many times that of waiting for its own threads and
# the kernel. Files lie in memory: what is tried is the order of steps, not the disk.
# Settings: CASES (100000), CHUNK (1000), SEED (random; chunk i has SEED + i), JOBS (four a CPU), WRAP (a command to run each chunk
# under, e.g. "nice"), STORE_TESTS (the library's tests, where they have been built).

cd "$(dirname "$0")/../.." || exit 2
set -euo pipefail

CASES=${CASES:-100000}
CHUNK=${CHUNK:-1000}
SEED=${SEED:-$((RANDOM << 30 | RANDOM << 15 | RANDOM))}
JOBS=${JOBS:-$((4 * $(nproc)))}
WRAP=${WRAP:-}
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
die() { echo "$(basename "$0"): $*" >&2; exit 2; }
command -v jq >/dev/null || die "needs jq (apt-get install jq)"
find_cargo || die "no cargo of version $RUST_VERSION or newer"

TEST=${STORE_TESTS:-}
if [[ -z $TEST ]]; then
    # shellcheck disable=SC2086 # WRAP is words
    TEST=$($WRAP cargo test --offline --release --no-default-features --lib --no-run --message-format=json |
        jq -r 'select(.executable != null and .target.name == "taffrail") | .executable' | tail -n 1)
fi
[[ -x $TEST ]] || die "cargo built no tests of the library"

TMPDIR=$(mktemp -d /dev/shm/taffrail-model.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 130' INT TERM

chunk() {
    local seed=$1 cases=$2 log=$TMPDIR/log.$1
    # A chunk's files go with it, also when it fails.
    mkdir "$TMPDIR/$seed"
    # shellcheck disable=SC2086
    if TMPDIR=$TMPDIR/$seed TAFFRAIL_CASES=$cases PROPTEST_RNG_SEED=$seed $WRAP "$TEST" --exact \
        storage::lsm::tests::what_is_durable_is_read_whatever_happens --nocapture >"$log" 2>&1 &&
        grep -q '^test result: ok. 1 passed' "$log"; then
        echo "$cases" >"$log.done"
    else
        cp "$log" "target/store-model-failed-$seed.log"
        echo "seed $seed failed: target/store-model-failed-$seed.log"
        tail -n 40 "$log"
    fi
    rm -rf "${TMPDIR:?}/$seed" "$log"
}

begun=0 number=0
while ((begun < CASES)); do
    cases=$((CASES - begun < CHUNK ? CASES - begun : CHUNK))
    while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || true; done
    chunk $((SEED + number)) "$cases" &
    begun=$((begun + cases)) number=$((number + 1))
    ((number % 10)) || echo "$begun sequences begun"
done
wait
done=$(cat "$TMPDIR"/log.*.done 2>/dev/null | awk '{ sum += $1 } END { print sum + 0 }')
echo "seeds $SEED to $((SEED + number - 1)), $CHUNK sequences each"
echo "store-model $done (bar 100000)"
((done >= CASES))
