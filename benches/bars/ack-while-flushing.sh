#!/usr/bin/env bash
# ack-while-flushing.sh - p99 of an acknowledgement of acks=all at a steady rate while the store behind the log flushes and
# merges and a reader reads the past, as a multiple of the p99 at the same rate with the log alone.
#
# `taffrail produce`, in a network namespace of its own, sends RATE messages a second of SIZE bytes over veth to a server on an
# AF_PACKET port, all roles on one core. The log alone: segments so large that none is sealed, and no reader. Else: SEGMENT, so
# that one is sealed every second or two, and `taffrail read` fetches READ messages from the beginning every second. The two alternate; the figure is the median of the
# rounds' ratios. Settings: ROUNDS (3), COUNT (100000), RATE (10000), SIZE (600), SEGMENT (8MiB), READ (RATE), BAR (2, at most), DIR.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-3}
COUNT=${COUNT:-100000}
RATE=${RATE:-10000}
SIZE=${SIZE:-600}
SEGMENT=${SEGMENT:-8MiB}
READ=${READ:-$RATE}
DIR=${DIR:-target}
((EUID == 0)) || die "needs root, for namespaces and packet sockets"
command -v jq >/dev/null || die "needs jq (apt-get install jq)"
need_hugepages 160

disk=$(mktemp -d "$DIR/flushing-bar.XXXXXX")
UNDO+=("rm -rf '$disk'")
producer=tfwf-p-$$ box=tfwf-b-$$
UNDO+=("ip netns delete $producer" "ip netns delete $box" "rm -rf /var/run/dpdk/tfwf-$$")
join_by_veth "$producer" "$box"

# The segment that is written and two behind it.
segments_ready() { (($(find "$disk/data" -name '*.seg' | wc -l) >= 3)); }

# run SEGMENT_SIZE READ: sets p50 and p99 in µs, and files: the SSTs at the end.
run() {
    rm -rf "$disk/data"
    cat >"$SCRATCH/taffrail.toml" <<TOML
[storage]
path = "$disk/data"
segment_size = "$1"
[lcores]
layout = "shared"
[eal]
file_prefix = "tfwf-$$"
[control]
socket = "$SCRATCH/control.sock"
[[port]]
name = "p0"
device = "eth0"
addresses = ["10.77.0.2/24"]
[[topic]]
name = "orders"
partitions = 4
[datagram]
udp_port = 9700
TOML
    ip netns exec "$box" "$TAFFRAIL" serve --config "$SCRATCH/taffrail.toml" >"$SCRATCH/server.log" 2>&1 &
    local server=$! reader=
    UNDO+=("kill -TERM $server")
    wait_for 60 test -S "$SCRATCH/control.sock"
    local produce=(ip netns exec "$producer" "$TAFFRAIL" produce orders --server 10.77.0.2:9700 --acks all --rate "$RATE"
        --size "$SIZE" --quiet --format json)
    "${produce[@]}" --count $((COUNT / 5)) >/dev/null # paths, caches, ARP
    # Zeros of segments to come would be measured as well: at rest they are written at full speed.
    wait_for 120 segments_ready
    if [[ $2 == read ]]; then
        (while :; do
            "$TAFFRAIL" read orders --count "$READ" --config "$SCRATCH/taffrail.toml" >/dev/null 2>&1
            sleep 1
        done) &
        reader=$!
        UNDO+=("kill $reader")
    fi
    read -r p50 p99 < <("${produce[@]}" --count "$COUNT" | jq -r '.summary.latency_us | "\(.p50) \(.p99)"')
    files=$(find "$disk/data" -name 'sst-*.sst' | wc -l)
    if [[ -n $reader ]]; then
        kill "$reader" 2>/dev/null || true
        wait "$reader" 2>/dev/null || true
    fi
    kill -TERM "$server"
    wait "$server" || die "the server failed: $(tail -n 5 "$SCRATCH/server.log")"
    rm -f "$SCRATCH/control.sock"
}

ratios=()
for ((round = 1; round <= ROUNDS; round++)); do
    run 1GiB alone
    alone50=$p50 alone99=$p99
    ((files == 0)) || die "the log alone was flushed"
    run "$SEGMENT" read
    ((files > 0)) || die "nothing was flushed"
    ratios+=("$(awk -v o="$p99" -v a="$alone99" 'BEGIN { printf "%.2f", o / a }')")
    echo "round $round: log alone p50 $alone50, p99 $alone99 µs; flushing ($files SSTs) and reading p50 $p50, p99 $p99 µs; ratio ${ratios[-1]}"
done
verdict ack-p99-while-flushing "$(median "${ratios[@]}")" "${BAR:-2}" at-most
