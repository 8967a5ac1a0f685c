#!/usr/bin/env bash
# lsm-open.sh - seconds that a store of 100 million messages in 10,000 partitions takes to open after a clean stop, its files
# not in the page cache; and the rate at which a log is recovered whose process was stopped without closing it, as a ratio to
# fio's sequential read of a segment.
#
# The store is FILES SSTs as flushes leave them, unmerged, each with all partitions. Medians of ROUNDS.
# Settings: ROUNDS (3), MESSAGES (100000000), PARTITIONS (10000), FILES (20), WAL_MB (1024), BAR (2, at most),
# RECOVERY_BAR (0.7), DIR.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh
# shellcheck source=benches/bars/lsm-lib.sh
. benches/bars/lsm-lib.sh

ROUNDS=${ROUNDS:-3}
WAL_MB=${WAL_MB:-1024}
"$LSM_BENCH" build "$disk/store" --messages "${MESSAGES:-100000000}" --partitions "${PARTITIONS:-10000}" --files "${FILES:-20}"
seconds=()
for ((round = 1; round <= ROUNDS; round++)); do
    forget "$disk/store"
    seconds+=("$(figure seconds open "$disk/store")")
done
rm -rf "$disk/store"

"$LSM_BENCH" recover "$disk/log" --mb "$WAL_MB" --fill
ratios=()
for ((round = 1; round <= ROUNDS; round++)); do
    rm -rf "$disk/copy"
    cp -r --sparse=never "$disk/log" "$disk/copy"
    segment=$(find "$disk/copy" -name '*.seg' | sort | head -n 1)
    forget "$disk/copy"
    fio=$(fio_read 1M read 8 "$segment" 2 'bw_bytes / 1e6')
    forget "$disk/copy"
    ours=$(figure mb_per_s recover "$disk/copy" --mb "$WAL_MB")
    ratios+=("$(awk -v o="$ours" -v f="$fio" 'BEGIN { printf "%.3f", o / f }')")
    echo "round $round: recovered at $ours MB/s, fio $fio MB/s, ratio ${ratios[-1]}"
done
failed=0
verdict lsm-open-seconds "$(median "${seconds[@]}")" "${BAR:-2}" at-most || failed=1
verdict lsm-recovery-vs-fio "$(median "${ratios[@]}")" "${RECOVERY_BAR:-0.7}" || failed=1
exit "$failed"
