#!/usr/bin/env bash
# kills.sh - SIGKILLs of a loaded server, and the messages acknowledged with acks=1 or acks=all that are
# then not in the log exactly once, at the offset and in the place they were told.
#
# Runs tests/kills.rs in chunks of a store each, the staging file in turn on tmpfs and (where there are
# hugepages) on hugetlbfs. Settings: KILLS (1000), CHUNK (50), SEED (random; chunk i has SEED + i),
# WRAP (a command to run each chunk under, e.g. "nice"), PROFILE (release; dev builds faster).

cd "$(dirname "$0")/../.." || exit 2
set -euo pipefail

KILLS=${KILLS:-1000}
CHUNK=${CHUNK:-50}
SEED=${SEED:-$((RANDOM << 30 | RANDOM << 15 | RANDOM))}
WRAP=${WRAP:-}
PROFILE=${PROFILE:-release}
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
die() { echo "$(basename "$0"): $*" >&2; exit 2; }
((EUID == 0)) || die "needs root, for namespaces and packet sockets"
command -v jq >/dev/null || die "needs jq (apt-get install jq)"
find_cargo || die "no cargo of version $RUST_VERSION or newer"

# scripts/demo.sh has built it: cargo says where it lies, and builds what changed since.
# shellcheck disable=SC2086 # WRAP is words
TEST=$($WRAP cargo test --offline --profile "$PROFILE" --test kills --no-run --message-format=json |
    jq -r 'select(.executable != null and .target.name == "kills") | .executable' | tail -n 1)
[[ -x $TEST ]] || die "cargo built no test 'kills'"

folders=(/dev/shm)
huge=$(awk '$3 == "hugetlbfs" { print $2; exit }' /proc/mounts)
# Two staging files of 4 MiB and a header.
if [[ -n $huge ]] && (($(awk '/^HugePages_Free/ { print $2 }' /proc/meminfo) >= 8)); then
    folders+=("$huge")
else
    echo "staging on tmpfs only: no 16 MiB of hugepages are free"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
killed=0 acknowledged=0 lost=0 duplicate=0 wrong=0 chunk=0 status=0
while ((killed < KILLS)); do
    left=$((KILLS - killed))
    staging=${folders[chunk % ${#folders[@]}]}
    # shellcheck disable=SC2086
    TAFFRAIL_KILLS=$((left < CHUNK ? left : CHUNK)) TAFFRAIL_SEED=$((SEED + chunk)) TAFFRAIL_STAGING=$staging \
        $WRAP "$TEST" --nocapture >"$log" 2>&1 || status=1
    grep -E '^(TAFFRAIL_KILLS|slow:|kills |acknowledged )' "$log" | sed "s|^TAFFRAIL_KILLS|staging $staging, &|" || true
    if ((status)); then
        # What the servers say would bury it.
        grep -E -A 8 "panicked at" "$log" | head -n 60 || true
        cp "$log" target/kills-failed.log
        echo "all of it: target/kills-failed.log"
    fi
    # "kills N ...", "acknowledged N acks1 N all N lost N duplicate N wrong N"
    read -r -a counts < <(awk '/^kills / { k = $2 } /^acknowledged / { print k, $2, $8, $10, $12 }' "$log") ||
        die "the test broke off, seed $((SEED + chunk))"
    killed=$((killed + counts[0])) acknowledged=$((acknowledged + counts[1]))
    lost=$((lost + counts[2])) duplicate=$((duplicate + counts[3])) wrong=$((wrong + counts[4]))
    chunk=$((chunk + 1))
done
echo "$killed kills, seeds $SEED to $((SEED + chunk - 1)): $acknowledged messages acknowledged, $lost lost, $duplicate doubled, $wrong misplaced or changed"
echo "kills-lost $((lost + duplicate + wrong)) of $acknowledged (bar 0)"
((lost + duplicate + wrong == 0 && status == 0 && killed >= KILLS))
