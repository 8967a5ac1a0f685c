#!/usr/bin/env bash
# kills-store.sh - SIGKILLs of a server whose store flushes, merges, compacts by key and expires messages at those
# moments, and the acknowledged messages that are then lost, doubled, changed, or back from where retention and
# compaction had put them.
#
# Runs tests/kills_store.rs in chunks of a store each. Settings: KILLS (1000), CHUNK (25), SEED (random; chunk i has
# SEED + i), WRAP (a command to run each chunk under, e.g. "nice"), PROFILE (release; dev builds faster), TMPDIR.

cd "$(dirname "$0")/../.." || exit 2
set -euo pipefail

KILLS=${KILLS:-1000}
CHUNK=${CHUNK:-25}
SEED=${SEED:-$((RANDOM << 30 | RANDOM << 15 | RANDOM))}
WRAP=${WRAP:-}
PROFILE=${PROFILE:-release}
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
die() { echo "$(basename "$0"): $*" >&2; exit 2; }
command -v jq >/dev/null || die "needs jq (apt-get install jq)"
find_cargo || die "no cargo of version $RUST_VERSION or newer"

# shellcheck disable=SC2086 # WRAP is words
TEST=$($WRAP cargo test --offline --profile "$PROFILE" --test kills_store --no-run --message-format=json |
    jq -r 'select(.executable != null and .target.name == "kills_store") | .executable' | tail -n 1)
[[ -x $TEST ]] || die "cargo built no test 'kills_store'"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
killed=0 acknowledged=0 faults=0 flushes=0 merges=0 removals=0 chunk=0 status=0
while ((killed < KILLS)); do
    left=$((KILLS - killed))
    # shellcheck disable=SC2086
    TAFFRAIL_KILLS=$((left < CHUNK ? left : CHUNK)) TAFFRAIL_SEED=$((SEED + chunk)) $WRAP "$TEST" --nocapture >"$log" 2>&1 ||
        status=1
    grep -E '^(TAFFRAIL_KILLS|kills |interrupted |acknowledged )' "$log" || true
    if ((status)); then
        # What the servers say would bury it.
        grep -E -A 24 "panicked at" "$log" | head -n 80 || true
        cp "$log" target/kills-store-failed.log
        echo "all of it: target/kills-store-failed.log"
    fi
    # "kills N ...", "interrupted flushes N merges N empty N removals N edits N",
    # "acknowledged N acks1 N all N lost N doubled N wrong N back N"
    read -r -a counts < <(awk '/^kills / { k = $2 } /^interrupted / { f = $3; m = $5; r = $9 }
        /^acknowledged / { print k, $2, $8 + $10 + $12 + $14, f, m, r }' "$log") ||
        die "the test broke off, seed $((SEED + chunk))"
    killed=$((killed + counts[0])) acknowledged=$((acknowledged + counts[1])) faults=$((faults + counts[2]))
    flushes=$((flushes + counts[3])) merges=$((merges + counts[4])) removals=$((removals + counts[5]))
    chunk=$((chunk + 1))
done
echo "$killed kills, seeds $SEED to $((SEED + chunk - 1)): $flushes flushes, $merges merges and $removals removals interrupted"
echo "kills-store-faults $faults of $acknowledged acknowledged messages (bar 0)"
((faults == 0 && status == 0 && killed >= KILLS))
