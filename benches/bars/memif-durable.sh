#!/usr/bin/env bash
# memif-durable.sh - messages made durable a second from net_memif on one core, as a ratio to what
# dpdk-testpmd in rxonly mode receives from the same generator on the same core.
#
# The generator (dpdk-testpmd, txonly, 64-byte UDP packets) has CPU 0; testpmd rxonly and then the
# appliance, all its threads included, have CPU 1. Each round measures both; the figure is the
# median of the rounds' ratios. Settings: ROUNDS (3), SECONDS_EACH (8), BAR (0.25).

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-3}
SECONDS_EACH=${SECONDS_EACH:-8}
BAR=${BAR:-0.25}
(($(nproc) >= 2)) || die "needs two CPUs: one for the generator, one for the receiver"
command -v dpdk-testpmd >/dev/null || die "needs dpdk-testpmd (apt-get install dpdk-dev)"
need_hugepages 1200

MAC=02:00:00:00:00:01

# testpmd ends at the end of its standard input, so a fifo holds that open.
start_generator() {
    rm -f "$SCRATCH/memif.sock" "$SCRATCH/stdin"
    mkfifo "$SCRATCH/stdin"
    sleep 600 >"$SCRATCH/stdin" &
    GENERATOR_STDIN=$!
    dpdk-testpmd --file-prefix="gen$$" --lcores '0@0,1@0' --no-pci --huge-unlink=always -m 256 \
        --vdev="net_memif0,role=server,socket=$SCRATCH/memif.sock,socket-abstract=no" -- \
        --forward-mode=txonly --txpkts=64 --burst=32 --total-num-mbufs=8192 --stats-period 60 \
        --eth-peer="0,$MAC" --tx-ip=10.77.0.1,10.77.0.2 --tx-udp=9000,9000 \
        <"$SCRATCH/stdin" >"$SCRATCH/gen.log" 2>&1 &
    GENERATOR=$!
    wait_for 20 test -S "$SCRATCH/memif.sock"
}

stop_generator() {
    kill -INT "$GENERATOR" 2>/dev/null || true
    kill "$GENERATOR_STDIN" 2>/dev/null || true
    wait "$GENERATOR" "$GENERATOR_STDIN" 2>/dev/null || true
}
UNDO+=("stop_generator")
GENERATOR=0 GENERATOR_STDIN=0

# Packets a second that testpmd receives, averaged over the run, into RESULT.
rxonly() {
    start_generator
    timeout -s INT $((SECONDS_EACH + 4)) dpdk-testpmd --file-prefix="sink$$" --lcores '0@1,1@1' --no-pci --huge-unlink=always -m 256 \
        --vdev="net_memif0,role=client,socket=$SCRATCH/memif.sock,socket-abstract=no" -- \
        --forward-mode=rxonly --burst=32 --total-num-mbufs=8192 --stats-period 2 \
        <"$SCRATCH/stdin" >"$SCRATCH/sink.log" 2>&1 || true
    stop_generator
    # The first show is the warm-up.
    RESULT=$(awk '/Rx-pps/ { if ($2 > 0 && n++) { sum += $2; k++ } } END { printf "%.0f\n", k ? sum / k : 0 }' "$SCRATCH/sink.log")
}

durable_now() { # "unix_ms messages" of the running server
    taskset -c 0 "$TAFFRAIL" stats --json --socket "$SCRATCH/control.sock" |
        taskset -c 0 python3 -c 'import json,sys
s = json.load(sys.stdin)
print(s["unix_ms"], sum(p["high_watermark"] - p["start"] for t in s["topics"] for p in t["partitions"]))'
}

# Messages a second that become durable in the appliance, into RESULT.
appliance() {
    local from to server
    rm -rf "$SCRATCH/data"
    cat >"$SCRATCH/taffrail.toml" <<TOML
[storage]
path = "$SCRATCH/data"
segment_size = "1GiB"
prepared_segments = 4
[lcores]
layout = "shared"
cpu = 1
idle = "poll"
[eal]
file_prefix = "box$$"
[control]
socket = "$SCRATCH/control.sock"
[[port]]
name = "p0"
device = "net_memif0,role=client,socket=$SCRATCH/memif.sock,socket-abstract=no,mac=$MAC"
addresses = ["10.77.0.2/24"]
[[topic]]
name = "ticks"
[[udp]]
udp_port = 9000
topic = "ticks"
TOML
    start_generator
    taskset -c 1 "$TAFFRAIL" serve --config "$SCRATCH/taffrail.toml" >"$SCRATCH/server.log" 2>&1 &
    server=$!
    UNDO+=("kill -TERM $server; wait $server")
    wait_for 60 test -S "$SCRATCH/control.sock"
    sleep 2
    from=$(durable_now)
    sleep "$SECONDS_EACH"
    to=$(durable_now)
    stop_generator
    "$TAFFRAIL" stats --socket "$SCRATCH/control.sock" >"$SCRATCH/stats.txt"
    kill -TERM $server
    wait $server || die "the appliance failed: $(tail -n 5 "$SCRATCH/server.log")"
    RESULT=$(awk -v a="$from" -v b="$to" 'BEGIN { split(a, f); split(b, t); printf "%.0f\n", (t[2] - f[2]) * 1000 / (t[1] - f[1]) }')
}

declare -a ratios
for ((round = 1; round <= ROUNDS; round++)); do
    rxonly
    peer=$RESULT
    ((peer > 0)) || die "testpmd received nothing: $(tail -n 5 "$SCRATCH/sink.log")"
    appliance
    ours=$RESULT
    ratios+=("$(awk -v o="$ours" -v p="$peer" 'BEGIN { printf "%.3f", o / p }')")
    echo "round $round: testpmd rxonly $peer packets/s, durable $ours messages/s, ratio ${ratios[-1]}"
done
cat "$SCRATCH/stats.txt"
verdict memif-durable "$(median "${ratios[@]}")" "$BAR"
