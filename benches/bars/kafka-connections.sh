#!/usr/bin/env bash
# kafka-connections.sh - memory of an idle connection of Kafka's protocol, and what many of them cost the busy ones.
#
# The load generator opens BUSY connections from 127.0.0.1 that together send RATE messages a second with acks=all, and
# measures the time from when each was to be sent to its acknowledgement; then it opens IDLE more, from several
# loopback addresses, each of which has said ApiVersions, and measures again. The figures are what the server's
# resident memory grew by for each idle connection, and the busy ones' p99 among the idle ones ÷ alone, both medians of the
# rounds. The kernel's memory for sockets is printed apart. Settings: ROUNDS (3), IDLE (100000), BUSY (1000), RATE (2000),
# SECONDS_EACH (8), THREADS (1), TRANSPORT (auto), DIR (a folder on the disk; the checkout's target/), PATIENCE (120:
# seconds that the server may take to start, and the idle connections to open).
#
# Where a process may not open that many files, as in most containers, kafka-connections-lab.sh runs this in an emulated
# machine.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-3}
IDLE=${IDLE:-100000}
BUSY=${BUSY:-1000}
RATE=${RATE:-2000}
SECONDS_EACH=${SECONDS_EACH:-8}
THREADS=${THREADS:-1}
TRANSPORT=${TRANSPORT:-auto}
PATIENCE=${PATIENCE:-120}
DIR=${DIR:-target}
OWN=${OWN:-$(find target/release/deps -maxdepth 1 -name 'kafka_load-*' -executable -type f -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)}
[[ -x $OWN ]] || die "no load generator: cargo bench --no-run --bench kafka_load"
status=0
if ! ulimit -n $((IDLE + BUSY + 1000)) 2>/dev/null; then
    # Not to be raised, as in a container without CAP_SYS_RESOURCE: what fits is measured, and the bar does not hold.
    ulimit -n "$(ulimit -Hn)"
    fits=$(($(ulimit -n) - BUSY - 500))
    echo "only $(ulimit -n) files may be open here: $fits idle connections instead of $IDLE; the bar is not shown"
    IDLE=$fits
    status=1
fi

disk=$(mktemp -d "$DIR/connections-bar.XXXXXX")
UNDO+=("rm -rf '$disk'")
declare -a bytes ratios
for ((round = 1; round <= ROUNDS; round++)); do
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    cat >"$SCRATCH/taffrail.toml" <<TOML
[storage]
path = "$disk/data-$round"
# So that none is being filled with zeros while a figure is taken.
segment_size = "64MiB"
[eal]
file_prefix = "tfkc-$$"
hugepages = false
[control]
socket = "$SCRATCH/control-$round.sock"
[kafka]
listen = ["127.0.0.1:$port"]
threads = $THREADS
transport = "$TRANSPORT"
max_connections = $((IDLE + BUSY + 100))
# None is closed for having been idle, however slow the machine is.
idle_timeout = "1day"
[memory]
# By io_uring each is charged with 1.5 KiB.
kafka_connections = "$(((IDLE + BUSY + 100) * 3 / 2))KiB"
TOML
    "$TAFFRAIL" serve --config "$SCRATCH/taffrail.toml" >"$SCRATCH/server.log" 2>&1 &
    server=$!
    UNDO+=("kill -TERM $server; wait $server")
    wait_for "$PATIENCE" test -S "$SCRATCH/control-$round.sock"
    kcat -b "127.0.0.1:$port" -L -t busy >/dev/null 2>&1 || true
    timeout $((3 * PATIENCE + 4 * SECONDS_EACH)) "$OWN" connections --address "127.0.0.1:$port" --topic busy --busy "$BUSY" --rate "$RATE" \
        --seconds "$SECONDS_EACH" --idle "$IDLE" --pid "$server" --patience "$PATIENCE" >"$SCRATCH/load.log" 2>&1 ||
        die "the load: $(tail -n 3 "$SCRATCH/load.log") $(tail -n 3 "$SCRATCH/server.log")"
    echo "round $round:"
    sed 's/^/  /' "$SCRATCH/load.log"
    bytes+=("$(sed -nE 's/^bytes an idle connection: //p' "$SCRATCH/load.log")")
    ratios+=("$(sed -n 's/^p99 ratio: //p' "$SCRATCH/load.log")")
    kill -TERM "$server"
    wait "$server" || die "the server failed: $(tail -n 5 "$SCRATCH/server.log")"
done
verdict kafka-bytes-an-idle-connection "$(median "${bytes[@]}")" 10240 at-most || status=1
verdict kafka-busy-p99-among-idle "$(median "${ratios[@]}")" 2 at-most || status=1
exit "$status"
