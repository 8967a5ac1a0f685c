#!/usr/bin/env bash
# wal-vs-fio.sh - bytes the log makes durable a second, as a ratio to fio on the same disk in the
# same run: io_uring, O_DIRECT, RWF_DSYNC (--sync=dsync), same block size and depth, a file that was
# preallocated and written once. Alternating runs; the figure is the median of the rounds' ratios.
#
# Settings: ROUNDS (3), MB (1024), COMMIT (262144), DEPTH (4), BAR (0.8), DIR (a folder on the disk
# to measure; the checkout's target/).

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-3}
MB=${MB:-1024}
COMMIT=${COMMIT:-262144}
DEPTH=${DEPTH:-4}
BAR=${BAR:-0.8}
DIR=${DIR:-target}
command -v fio >/dev/null || die "needs fio (apt-get install fio)"
command -v jq >/dev/null || die "needs jq (apt-get install jq)"

mkdir -p "$DIR"
disk=$(mktemp -d "$DIR/wal-bar.XXXXXX")
UNDO+=("rm -rf '$disk'")
# The log's staging buffer lies in huge pages, as the server's does: its writes are a tenth to a third faster from there.
need_hugepages 64

BENCH=$(built wal cargo build --release --bench wal --message-format=json)
# Batches of a quarter commit: four fill a frame all but its padding.
BATCH=$((COMMIT / 4 - 64))

# A file written once, as the log's segments are.
fio --name=lay --filename="$disk/fio" --rw=write --bs=1M --size="${MB}M" --direct=1 \
    --ioengine=io_uring --iodepth=4 --end_fsync=1 --output=/dev/null

fio_mb() {
    fio --name=wal --filename="$disk/fio" --rw=write --bs="$COMMIT" --size="${MB}M" --direct=1 \
        --ioengine=io_uring --iodepth="$DEPTH" --sync=dsync --overwrite=1 --fixedbufs=1 \
        --output-format=json | jq '.jobs[0].write.bw_bytes / 1e6'
}

wal_mb() {
    "$BENCH" --dir "$disk/log" --mb "$MB" --commit "$COMMIT" --depth "$DEPTH" --batch "$BATCH" |
        tee /dev/stderr | jq .mb_per_s
}

ratios=()
for ((round = 1; round <= ROUNDS; round++)); do
    # Who goes first changes, so that a drift of the disk favours neither.
    if ((round % 2)); then
        fio=$(fio_mb)
        wal=$(wal_mb)
    else
        wal=$(wal_mb)
        fio=$(fio_mb)
    fi
    ratio=$(awk -v w="$wal" -v f="$fio" 'BEGIN { printf "%.3f", w / f }')
    echo "round $round: log $wal MB/s, fio $fio MB/s, ratio $ratio"
    ratios+=("$ratio")
done
verdict wal-vs-fio "$(median "${ratios[@]}")" "$BAR"
