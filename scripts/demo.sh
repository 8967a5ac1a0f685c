#!/usr/bin/env bash
# demo.sh - installs, builds, and runs Taffrail's main job with real traffic on virtual devices.
#
# usage: sudo scripts/demo.sh [--messages N] [--rate N]
#
# A network namespace is the producer host, joined by veth to another one in which the appliance has
# the cable's end as a DPDK port (AF_PACKET). The producer's kernel sends a million UDP messages
# (--messages, at --rate a second) and `taffrail produce` some thousands of acknowledged ones; the
# appliance is stopped and started again, messages are read back, and everything sent is accounted for.
# Leaves nothing behind; can be run again.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

messages=1000000 rate=50000 acknowledged=5000
while (($# > 0)); do
    case $1 in
        --messages) messages=${2:?}; shift ;;
        --rate) rate=${2:?}; shift ;;
        *) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
    esac
    shift
done

need_root
scripts/install-deps.sh --run --build --test
find_cargo || die "no cargo of version $RUST_VERSION or newer"
say "building (release; benches and the kills test too, so that benches/bars need no build)"
export CARGO_TERM_COLOR=never
cargo build --release --bins --benches
cargo test --release --test kills --no-run

taffrail=$PWD/target/release/taffrail
producer=tfdemo-p-$$ box=tfdemo-b-$$
work=$(mktemp -d "${TMPDIR:-/tmp}/taffrail-demo.XXXXXX")
socket=$work/control.sock
server=
cleanup() {
    set +e
    # A clean stop, so that no staging file stays in huge pages.
    [[ -z $server ]] || { kill -TERM "$server"; wait "$server"; } 2>/dev/null
    ip netns delete "$producer" 2>/dev/null
    ip netns delete "$box" 2>/dev/null
    rm -rf "$work" "/var/run/dpdk/tfdemo-$$"
    restore_hugepages
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say "machine: hugepages, and two hosts joined by veth"
reserve_hugepages 256
grep -E '^HugePages_(Total|Free)' /proc/meminfo
join_by_veth "$producer" "$box"

cat >"$work/taffrail.toml" <<TOML
[storage]
path = "$work/data"
segment_size = "64MiB"
[lcores]
layout = "shared"
[eal]
file_prefix = "tfdemo-$$"
[control]
socket = "$socket"
[[port]]
name = "p0"
device = "eth0"
addresses = ["10.77.0.2/24"]
[[topic]]
name = "telemetry"
[[topic]]
name = "orders"
partitions = 4
[[udp]]
udp_port = 5000
topic = "telemetry"
[datagram]
udp_port = 9700
TOML

start() {
    ip netns exec "$box" "$taffrail" serve --config "$work/taffrail.toml" &
    server=$!
    for _ in $(seq 200); do
        [[ -S $socket ]] && return 0
        kill -0 "$server" 2>/dev/null || die "the appliance did not start"
        sleep 0.1
    done
    die "the appliance does not answer"
}
stop() {
    kill -TERM "$server"
    wait "$server"
    server=
}
# field EXPRESSION: of the server's statistics, as Python sees them (s).
field() { "$taffrail" stats --json --socket "$socket" | python3 -c "import json,sys; s=json.load(sys.stdin); print($1)"; }

say "the appliance starts on its end of the veth pair, all roles on one core"
"$taffrail" check --config "$work/taffrail.toml"
start
ip netns exec "$producer" ping -c 2 -i 0.2 10.77.0.2

say "$messages UDP messages from the producer's kernel, live rates meanwhile"
ip netns exec "$producer" "$taffrail" send-udp --to 10.77.0.2:5000 --count "$messages" --size 100 \
    --rate "$rate" --prefix 'telemetry ' >"$work/sent.json" &
sender=$!
"$taffrail" stats --socket "$socket" --watch --interval 4 --count $((messages / rate / 4 + 2))
wait "$sender"
cat "$work/sent.json"

say "$acknowledged acknowledged messages by the client library (acks=all)"
seq -f 'order %.0f' "$acknowledged" |
    ip netns exec "$producer" "$taffrail" produce orders --server 10.77.0.2:9700 --acks all --quiet

# What is on its way arrives.
for _ in $(seq 50); do
    (($(field "sum(t['in_flight'] for t in s['topics'])") == 0)) && break
    sleep 0.1
done
say "accounts before the stop"
"$taffrail" stats --socket "$socket"
"$taffrail" stats --json --socket "$socket" >"$work/stats.json"

say "stop, start again, read back"
stop
"$taffrail" verify "$work/data"
start
"$taffrail" read telemetry --from 0 --count 2 --socket "$socket"
"$taffrail" read telemetry --from $((messages / 2)) --count 2 --format json --socket "$socket"
"$taffrail" read orders --partition 2 --count 2 --format hex --socket "$socket"
for partition in 0 1 2 3; do
    "$taffrail" read orders --partition $partition --socket "$socket"
done | sort -u | wc -l >"$work/orders"
"$taffrail" read telemetry --socket "$socket" | awk '{ print $2 }' | sort -nu | wc -l >"$work/telemetry"
stop

say "accounting"
python3 - "$work" "$messages" "$acknowledged" <<'PY'
import json, sys
work, sent, acknowledged = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stats = json.load(open(f"{work}/stats.json"))
topics = {topic["name"]: topic for topic in stats["topics"]}
read = {name: int(open(f"{work}/{name}").read()) for name in ("telemetry", "orders")}
port = stats["ports"][0]
telemetry, orders = topics["telemetry"], topics["orders"]
lost = {f"{reason} (topic)": n for reason, n in telemetry["dropped"].items()}
before = sent - telemetry["received"]
counted_before = port["nic"].get("not_delivered", 0) + port["nic"].get("missed", 0)
print(f"sent {sent} = stored {telemetry['stored']} + dropped {sum(lost.values())} {lost or ''}"
      f" + lost before the receiver {before} (counted by the port: {counted_before})")
print(f"orders: acknowledged {acknowledged}, stored {orders['stored']}, duplicates answered {orders['duplicate']}")
print(f"read back after the restart: {read['telemetry']} different telemetry messages, {read['orders']} different orders")
wrong = []
if telemetry["received"] != telemetry["stored"] + sum(lost.values()):
    wrong.append("received is not stored + dropped")
if before != counted_before:
    wrong.append(f"{before} messages did not reach the receiver, {counted_before} are counted")
if read["telemetry"] != telemetry["stored"] or read["orders"] != acknowledged or orders["stored"] != acknowledged:
    wrong.append("not every stored message was read back")
print("\nDOES NOT ADD UP: " + "; ".join(wrong) if wrong else "\nEvery message is accounted for.")
sys.exit(bool(wrong))
PY
