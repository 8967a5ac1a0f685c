#!/usr/bin/env bash
# kafka-transports.sh - Kafka's protocol by epoll against io_uring: messages a second, CPU, and latency.
#
# Two servers that differ in `[kafka] transport` alone run in the same run and are measured in turn, the other one stopped:
# the load generator produces (acks=all) and consumes batches made beforehand, then BUSY connections together send RATE
# single messages a second and wait for their acknowledgements. CPU is in seconds for a million messages: of the thread
# that serves the connections, and of the whole server until it rests. Latency is from when a message was to be sent to its
# acknowledgement. Medians of the rounds, which come after one that warms up. Settings: ROUNDS (3), MESSAGES of 100 bytes
# (3000000; a third as many of 1 KiB), SIZES ("100 1024"), BUSY ("1 100 1000"), RATE (10000), SECONDS_EACH (5), DIR (a
# folder on the disk; the checkout's target/).

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-3}
MESSAGES=${MESSAGES:-3000000}
SIZES=${SIZES:-100 1024}
BUSY=${BUSY:-1 100 1000}
RATE=${RATE:-10000}
SECONDS_EACH=${SECONDS_EACH:-5}
DIR=${DIR:-target}
PARTITIONS=4
OWN=${OWN:-$(find target/release/deps -maxdepth 1 -name 'kafka_load-*' -executable -type f -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)}
[[ -x $OWN ]] || die "no load generator: cargo bench --no-run --bench kafka_load"

disk=$(mktemp -d "$DIR/transports-bar.XXXXXX")
disk=$(realpath "$disk")
UNDO+=("rm -rf '$disk'")
declare -A pid address
for transport in epoll io_uring; do
    address[$transport]=127.0.0.1:$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    cat >"$SCRATCH/$transport.toml" <<TOML
[storage]
path = "$disk/$transport"
[eal]
file_prefix = "tftr-$transport-$$"
hugepages = false
[control]
socket = "$SCRATCH/$transport.sock"
[kafka]
listen = ["${address[$transport]}"]
transport = "$transport"
default_partitions = $PARTITIONS
TOML
    "$TAFFRAIL" serve --config "$SCRATCH/$transport.toml" >"$SCRATCH/$transport.log" 2>&1 &
    pid[$transport]=$!
    UNDO+=("kill -CONT ${pid[$transport]}; kill -TERM ${pid[$transport]}; wait ${pid[$transport]}")
    wait_for 60 test -S "$SCRATCH/$transport.sock"
    grep -q "served by $transport" "$SCRATCH/$transport.log" || die "no $transport here: $(tail -n 3 "$SCRATCH/$transport.log")"
done

hz=$(getconf CLK_TCK)
# ticks STAT...: user and system time of processes or threads so far, in clock ticks.
ticks() { sed 's/.*) //' "$@" | awk '{ sum += $12 + $13 } END { print sum }'; }
whole() { ticks "/proc/$1/stat"; }
# Nanoseconds on a CPU, of the threads that serve connections.
threads() {
    local task sum=0
    for task in "/proc/$1/task/"*; do
        [[ $(<"$task/comm") != kafka-* ]] || sum=$((sum + $(cut -d' ' -f1 "$task/schedstat")))
    done
    echo "$sum"
}

declare -A result
# measure TRANSPORT WHAT COUNT COMMAND...: what it prints is kept in client.log.
measure() {
    local transport=$1 what=$2 count=$3 server=${pid[$1]}
    shift 3
    local whole_before threads_before after i
    whole_before=$(whole "$server") threads_before=$(threads "$server")
    timeout 300 "$@" >"$SCRATCH/client.log" 2>&1 || die "$transport $what: $(tail -n 3 "$SCRATCH/client.log")"
    local spent=$(($(threads "$server") - threads_before))
    for ((i = 0; i < 20; i++)); do
        after=$(whole "$server")
        sleep 1
        (($(whole "$server") - after > 5)) || break
    done
    ((round > 0)) || return 0
    result["$what $transport thread"]+="$(awk -v t="$spent" -v n="$count" 'BEGIN { printf "%.4f", t / n / 1000 }') "
    result["$what $transport whole"]+="$(awk -v t=$((after - whole_before)) -v hz="$hz" -v n="$count" 'BEGIN { printf "%.3f", t / hz / n * 1e6 }') "
    result["$what $transport rate"]+="$(sed -n 's/ messages a second$//p' "$SCRATCH/client.log") "
    result["$what $transport p50"]+="$(sed -nE 's/^busy alone: .* p50 ([0-9]+) .*/\1/p' "$SCRATCH/client.log") "
    result["$what $transport p99"]+="$(sed -nE 's/^busy alone: .* p99 ([0-9]+) .*/\1/p' "$SCRATCH/client.log") "
}

for ((round = 0; round <= ROUNDS; round++)); do
    for transport in epoll io_uring; do
        other=$([[ $transport == epoll ]] && echo io_uring || echo epoll)
        kill -STOP "${pid[$other]}"
        for size in $SIZES; do
            count=$((MESSAGES * 100 / (size < 300 ? 100 : 300)))
            topic=t-$size-$round
            kcat -b "${address[$transport]}" -L -t "$topic" >/dev/null 2>&1 || true
            load=(--address "${address[$transport]}" --topic "$topic" --size "$size" --count "$count" --partitions "$PARTITIONS")
            measure "$transport" "produce-$size" "$count" "$OWN" produce "${load[@]}"
            measure "$transport" "consume-$size" "$count" "$OWN" consume "${load[@]}"
        done
        kcat -b "${address[$transport]}" -L -t busy >/dev/null 2>&1 || true
        for busy in $BUSY; do
            # It sends for a quarter of the time, then twice for all of it.
            measure "$transport" "busy-$busy" $((RATE * SECONDS_EACH * 9 / 4)) "$OWN" connections \
                --address "${address[$transport]}" --topic busy --busy "$busy" --rate "$RATE" \
                --seconds "$SECONDS_EACH" --idle 0 --pid "${pid[$transport]}"
        done
        kill -CONT "${pid[$other]}"
    done
done

printf '%-14s %-9s %12s %10s %10s %8s %8s\n' load transport 'messages/s' 'thread CPU' 'all CPU' 'p50 us' 'p99 us'
# of WHAT TRANSPORT FIELD: its median, or a dash.
of() {
    local values=${result["$1 $2 $3"]}
    # shellcheck disable=SC2086 # a list of numbers
    if [[ -z ${values// /} ]]; then echo -; else median $values; fi
}
for what in $(printf '%s\n' "${!result[@]}" | cut -d' ' -f1 | sort -uV); do
    for transport in epoll io_uring; do
        printf '%-14s %-9s %12s %10s %10s %8s %8s\n' "$what" "$transport" "$(of "$what" "$transport" rate)" \
            "$(of "$what" "$transport" thread)" "$(of "$what" "$transport" whole)" \
            "$(of "$what" "$transport" p50)" "$(of "$what" "$transport" p99)"
    done
done
