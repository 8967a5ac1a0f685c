#!/usr/bin/env bash
# ack-latency.sh - how long an acknowledgement of acks=all takes at a light load, beyond the disk itself.
#
# In each round fio measures the disk: RATE durable writes of 4 KiB a second (RWF_DSYNC, which is a write and an
# fdatasync) into a file that was written before, as the log's segments are. Then `taffrail produce`, in a network
# namespace and on a CPU of its own, as another host would, sends RATE messages a second over veth to a server on an
# AF_PACKET port, all roles on one core, and measures from sending to the acknowledgement. Both keep to their rate
# while the disk stalls: a flush that takes 14 ms delays seven writes, and seven messages. fio's figures with one write
# and fdatasync at a time, which waits out such a stall and counts it once, are printed beside them. The figure is the
# median of the rounds' p99 less the disk's p99, in ms. Settings: ROUNDS (5), COUNT (5000), RATE (500), IDLE (sleep),
# BAR (1), DIR (a folder on the disk to measure; the checkout's target/).

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-5}
COUNT=${COUNT:-5000}
RATE=${RATE:-500}
IDLE=${IDLE:-sleep}
BAR=${BAR:-1}
DIR=${DIR:-target}
((EUID == 0)) || die "needs root, for namespaces and packet sockets"
command -v fio >/dev/null || die "needs fio (apt-get install fio)"
(($(nproc) >= 2)) || die "needs two CPUs: one for the server's lcore, one for the producer"
need_hugepages 160

disk=$(mktemp -d "$DIR/latency-bar.XXXXXX")
UNDO+=("rm -rf '$disk'")
producer=tflat-p-$$ box=tflat-b-$$
UNDO+=("ip netns delete $producer" "ip netns delete $box" "rm -rf /var/run/dpdk/tflat-$$")
join_by_veth "$producer" "$box"
cat >"$SCRATCH/taffrail.toml" <<TOML
[storage]
path = "$disk/data"
segment_size = "64MiB"
[lcores]
layout = "shared"
cpu = 1
idle = "$IDLE"
[eal]
file_prefix = "tflat-$$"
[control]
socket = "$SCRATCH/control.sock"
[[port]]
name = "p0"
device = "eth0"
addresses = ["10.77.0.2/24"]
[[topic]]
name = "orders"
[datagram]
udp_port = 9700
TOML
ip netns exec "$box" "$TAFFRAIL" serve --config "$SCRATCH/taffrail.toml" >"$SCRATCH/server.log" 2>&1 &
server=$!
UNDO+=("kill -TERM $server; wait $server")
wait_for 60 test -S "$SCRATCH/control.sock"
fio --name=lay --filename="$disk/fio" --rw=write --bs=1M --size=64M --direct=1 --end_fsync=1 --output=/dev/null

# fio_us OPTION...: "p50 p99" of durable writes, in µs.
fio_us() {
    fio --name=sync --filename="$disk/fio" --rw=write --bs=4k --size=64M --io_size=$((COUNT * 4096)) --direct=1 \
        --overwrite=1 --lat_percentiles=1 --output-format=json "$@" | python3 -c '
import json, sys
job = json.load(sys.stdin)["jobs"][0]
write, sync = job["write"]["lat_ns"]["percentile"], job["sync"]["lat_ns"].get("percentile", {})
print(*(round((write[p] + sync.get(p, 0)) / 1e3) for p in ("50.000000", "99.000000")))'
}
at_rate() { fio_us --ioengine=io_uring --iodepth=256 --sync=dsync --rate_iops="$RATE"; }
one_at_a_time() { fio_us --ioengine=psync --fdatasync=1 --thinktime=$((1000000 / RATE)) --thinktime_blocks=1; }
# "p50 p99" of acknowledgements in µs.
ack_us() {
    taskset -c 0 ip netns exec "$producer" "$TAFFRAIL" produce orders --server 10.77.0.2:9700 --acks all --count "$COUNT" \
        --rate "$RATE" --size 100 --quiet --format json | python3 -c '
import json, sys
us = json.load(sys.stdin)["summary"]["latency_us"]
print(us["p50"], us["p99"])'
}

ack_us >/dev/null # paths, caches, ARP
declare -a beyond
for ((round = 1; round <= ROUNDS; round++)); do
    read -r one50 one99 < <(one_at_a_time)
    read -r disk50 disk99 < <(at_rate)
    read -r ack50 ack99 < <(ack_us)
    beyond+=("$(awk -v a="$ack99" -v d="$disk99" 'BEGIN { printf "%.3f", (a - d) / 1000 }')")
    echo "round $round: acknowledged p50 $ack50, p99 $ack99 µs; durable writes at this rate p50 $disk50, p99 $disk99 µs," \
        "one at a time p50 $one50, p99 $one99 µs"
done
kill -TERM "$server"
wait "$server" || die "the server failed: $(tail -n 5 "$SCRATCH/server.log")"
verdict "ack-latency-p99-beyond-disk-ms" "$(median "${beyond[@]}")" "$BAR" at-most
