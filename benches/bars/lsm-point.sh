#!/usr/bin/env bash
# lsm-point.sh - single messages by offset at random: cold, as a ratio to fio's random reads of 4 KiB at the same depth in the
# same run; and hot, messages a second on one core.
#
# Cold: the page cache is emptied of the store first; DEPTH threads read, among MB MiB on disk. fio: O_DIRECT, io_uring.
# Hot: among the first HOT offsets, whose blocks are in the cache. The figure is the median of ROUNDS.
# Settings: ROUNDS (3), MB (2048), DEPTH (8), HOT (100000), SECONDS_EACH (5), TARGET (the default), BAR (0.7),
# HOT_BAR (500000), DIR.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh
# shellcheck source=benches/bars/lsm-lib.sh
. benches/bars/lsm-lib.sh

ROUNDS=${ROUNDS:-3}
MB=${MB:-2048}
DEPTH=${DEPTH:-8}
HOT=${HOT:-100000}
each=${SECONDS_EACH:-5}
"$LSM_BENCH" build "$disk/store" --mb "$MB" --files 1 ${TARGET:+--target "$TARGET"}
file=$(find "$disk/store" -name '*.sst' | head -n 1)

ratios=() rates=()
for ((round = 1; round <= ROUNDS; round++)); do
    forget "$disk/store"
    cold=$(figure per_s point "$disk/store" --threads "$DEPTH" --seconds "$each")
    fio=$(fio_read 4k randread "$DEPTH" "$file" "$each" iops)
    hot=$(taskset -c 1 "$LSM_BENCH" point "$disk/store" --hot "$HOT" --seconds 2 | jq .per_s)
    ratios+=("$(awk -v o="$cold" -v f="$fio" 'BEGIN { printf "%.3f", o / f }')")
    rates+=("$(printf %.0f "$hot")")
    echo "round $round: cold $cold/s, fio $fio/s, ratio ${ratios[-1]}; hot $hot/s"
done
failed=0
verdict lsm-point-cold-vs-fio "$(median "${ratios[@]}")" "${BAR:-0.7}" || failed=1
verdict lsm-point-hot-per-s "$(median "${rates[@]}")" "${HOT_BAR:-500000}" || failed=1
exit "$failed"
