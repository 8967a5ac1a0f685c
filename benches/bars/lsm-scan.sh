#!/usr/bin/env bash
# lsm-scan.sh - reads a store in order, whole batches, each checksum verified, as a ratio to fio's sequential read of one of
# its files in the same run; and the same from memory, on one core, in GB/s of messages.
#
# On disk: the page cache is emptied of the store before each pass, and the reader runs in a memory cgroup of SHARE MiB where
# there is one (cgroup v1). fio reads with O_DIRECT, 1 MiB at a time, 8 in flight. From memory: a store of MB/8, read twice,
# the second time counts; its batches are not compressed, so that what is counted are messages' bytes.
# Settings: ROUNDS (3), MB (1024), SHARE (256), BAR (0.8), MEMORY_BAR (2), DIR.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh
# shellcheck source=benches/bars/lsm-lib.sh
. benches/bars/lsm-lib.sh

ROUNDS=${ROUNDS:-3}
MB=${MB:-1024}
SHARE=${SHARE:-256}
"$LSM_BENCH" build "$disk/store" --mb "$MB" --files 4
"$LSM_BENCH" build "$disk/plain" --mb $((MB / 8)) --files 1 --codec none
file=$(find "$disk/store" -name '*.sst' | head -n 1)

limited=()
group=/sys/fs/cgroup/memory/taffrail-bar-$$
if [[ -w /sys/fs/cgroup/memory ]] && mkdir "$group" 2>/dev/null; then
    UNDO+=("rmdir '$group'")
    echo $((SHARE << 20)) >"$group/memory.limit_in_bytes"
    limited=(bash -c 'echo $$ >'"$group"'/cgroup.procs; exec "$@"' limited)
fi
scan() {
    forget "$disk/store"
    "${limited[@]}" "$LSM_BENCH" scan "$disk/store" | tee /dev/stderr | jq .mb_per_s
}

ratios=() memory=()
for ((round = 1; round <= ROUNDS; round++)); do
    ours=$(scan)
    fio=$(fio_read 1M read 8 "$file" 3 'bw_bytes / 1e6')
    hot=$(taskset -c 1 "$LSM_BENCH" scan "$disk/plain" --passes 3 | jq '.mb_per_s / 1e3')
    ratios+=("$(awk -v o="$ours" -v f="$fio" 'BEGIN { printf "%.3f", o / f }')")
    memory+=("$(printf %.2f "$hot")")
    echo "round $round: store $ours MB/s, fio $fio MB/s, ratio ${ratios[-1]}; from memory $hot GB/s"
done
failed=0
verdict lsm-scan-vs-fio "$(median "${ratios[@]}")" "${BAR:-0.8}" || failed=1
verdict lsm-scan-memory-gb-per-s "$(median "${memory[@]}")" "${MEMORY_BAR:-2}" || failed=1
exit "$failed"
