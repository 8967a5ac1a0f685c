#!/usr/bin/env bash
# kafka-throughput.sh - messages a second, CPU and memory of Taffrail against a real Kafka, both over loopback.
#
# Both brokers run in the same run with four partitions and are measured in turn by librdkafka's rdkafka_performance,
# the one that is not measured stopped (Taffrail) or idle (Kafka): producing with acks=all, which means fdatasync on
# Taffrail and page cache on Kafka with its defaults (a second row shows Kafka with flush.messages=1), then consuming
# what was produced. In the same way with the project's own load generator, which sends batches made beforehand: the
# client costs next to nothing there, so the broker is the limit. CPU seconds are the broker's, user and system,
# for a million messages, what it does afterwards included until it rests; memory is its VmHWM (huge pages added) at the end; Kafka's page cache is in neither.
#
# The last lines are Taffrail's figures ÷ Kafka's in producing, the worst of both sizes, medians of the rounds. Needs
# scripts/kafka-peer.sh to have run. Settings: ROUNDS (3), MESSAGES of 100 bytes (3000000; a third as many of 1 KiB), SIZES
# ("100 1024"), CLIENTS ("rdkafka own"), DIR (a folder on the disk to measure; the checkout's target/), FLUSH (1: also
# Kafka's second row), THREADS (of Kafka's protocol in Taffrail, 1), LAYOUT (shared).

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

ROUNDS=${ROUNDS:-3}
MESSAGES=${MESSAGES:-3000000}
SIZES=${SIZES:-100 1024}
CLIENTS=${CLIENTS:-rdkafka own}
DIR=${DIR:-target}
FLUSH=${FLUSH:-1}
THREADS=${THREADS:-1}
LAYOUT=${LAYOUT:-shared}
PARTITIONS=4
PEER=$PWD/target/kafka-peer
[[ -f $PEER/installed ]] || die "no Kafka in $PEER: run scripts/kafka-peer.sh"
OWN=${OWN:-$(find target/release/deps -maxdepth 1 -name 'kafka_load-*' -executable -type f -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)}
[[ $CLIENTS != *own* || -x $OWN ]] || die "no load generator: cargo bench --no-run --bench kafka_load"

disk=$(mktemp -d "$DIR/throughput-bar.XXXXXX")
disk=$(realpath "$disk")
UNDO+=("rm -rf '$disk'")
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
ours=127.0.0.1:$(free_port)
theirs=127.0.0.1:$(free_port)
controller=127.0.0.1:$(free_port)

cat >"$SCRATCH/taffrail.toml" <<TOML
[storage]
path = "$disk/taffrail"
[lcores]
layout = "$LAYOUT"
[eal]
file_prefix = "tfkt-$$"
hugepages = false
[control]
socket = "$SCRATCH/control.sock"
[kafka]
listen = ["$ours"]
threads = $THREADS
default_partitions = $PARTITIONS
TOML
# shellcheck disable=SC2153 # lib.sh sets it
"$TAFFRAIL" serve --config "$SCRATCH/taffrail.toml" >"$SCRATCH/taffrail.log" 2>&1 &
taffrail=$!
UNDO+=("kill -CONT $taffrail; kill -TERM $taffrail; wait $taffrail" "rm -rf /var/run/dpdk/tfkt-$$")

cat >"$SCRATCH/kafka.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@$controller
listeners=PLAINTEXT://$theirs,CONTROLLER://$controller
controller.listener.names=CONTROLLER
log.dirs=$disk/kafka
num.partitions=$PARTITIONS
offsets.topic.replication.factor=1
PROPERTIES
tool() { java -Xmx256m -cp "$PEER/libs/*" "$@"; }
tool kafka.tools.StorageTool format -t "$(tool kafka.tools.StorageTool random-uuid)" -c "$SCRATCH/kafka.properties" \
    >"$SCRATCH/format.log" 2>&1 || die "Kafka's folder: $(tail -n 3 "$SCRATCH/format.log")"
# The options that Kafka's own start script gives.
java -Xmx1G -Xms1G -server -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -XX:InitiatingHeapOccupancyPercent=35 \
    -XX:+ExplicitGCInvokesConcurrent -Djava.awt.headless=true -cp "$PEER/libs/*" \
    kafka.Kafka "$SCRATCH/kafka.properties" >"$SCRATCH/kafka.log" 2>&1 &
kafka=$!
UNDO+=("kill -TERM $kafka; wait $kafka")
wait_for 60 test -S "$SCRATCH/control.sock"
# shellcheck disable=SC2317 # run by wait_for
answers() { tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$theirs" --list; }
wait_for 120 answers

# cpu PID: user and system time so far, in clock ticks.
cpu() { sed 's/.*) //' "/proc/$1/stat" | awk '{ print $12 + $13 }'; }
# memory PID: peak in MiB, huge pages added.
memory() { awk '/^(VmHWM|HugetlbPages):/ { kib += $2 } END { printf "%.0f", kib / 1024 }' "/proc/$1/status"; }
hz=$(getconf CLK_TCK)
# threads PID: the threads' shares of what they have taken, by name, the largest first.
threads() {
    # Name, then from the state on: user and system time are the 12th and 13th fields.
    sed -E 's/^[0-9]+ \((.*)\) /\1\t/; s/ /\t/g' /proc/"$1"/task/*/stat | awk -F '\t' '
        { ticks[$1] += $13 + $14; all += $13 + $14 }
        END { for (name in ticks) if (ticks[name] * 100 > all) printf "%d%% %s\n", 100 * ticks[name] / all, name }' |
        sort -rn | paste -sd, | sed 's/,/, /g'
}

# rdkafka and own: messages a second, as the client says at its end.
# shellcheck disable=SC2317 # run by measure
rdkafka() { # MODE ADDRESS TOPIC SIZE COUNT
    local args=(-b "$2" -t "$3" -c "$5" -q)
    if [[ $1 == produce ]]; then
        args+=(-P -s "$4" -a -1 -X queue.buffering.max.messages=1000000)
    else
        args+=(-C -o beginning)
        for ((p = 0; p < PARTITIONS; p++)); do args+=(-p "$p"); done
    fi
    timeout 300 "$PEER/rdkafka_performance" "${args[@]}" 2>&1 | tee "$SCRATCH/client.log" |
        sed -nE 's/.* ([0-9]+) msgs\/s.*/\1/p' | tail -n 1
}
# shellcheck disable=SC2317 # run by measure
own() { timeout 300 "$OWN" "$1" --address "$2" --topic "$3" --size "$4" --count "$5" --partitions "$PARTITIONS" | tee "$SCRATCH/client.log" | awk '/ messages a second$/ { print $1 }'; }

declare -A result
# measure NAME PID CLIENT MODE ADDRESS TOPIC SIZE COUNT
measure() {
    local before after rate
    before=$(cpu "$2")
    rate=$("$3" "$4" "$5" "$6" "$7" "$8")
    # What the broker does later with what it took belongs to it: until it has rested for a second.
    for ((i = 0; i < 20; i++)); do
        after=$(cpu "$2")
        sleep 1
        (($(cpu "$2") - after > 5)) || break
    done
    [[ -n $rate ]] || die "$1: $3 $4 failed: $(tail -n 3 "$SCRATCH/client.log")"
    local cpu_s
    cpu_s=$(awk -v t=$((after - before)) -v hz="$hz" -v n="$8" 'BEGIN { printf "%.3f", t / hz / n * 1e6 }')
    result["$1 $3 $4 $7 rate"]+="$rate "
    result["$1 $3 $4 $7 cpu"]+="$cpu_s "
}

for ((round = 0; round <= ROUNDS; round++)); do
    for client in $CLIENTS; do
        for size in $SIZES; do
            count=$((MESSAGES * 100 / (size < 300 ? 100 : 300)))
            topic=t-$client-$size-$round
            for broker in taffrail kafka flushing; do
                case $broker in
                    taffrail) pid=$taffrail address=$ours ;;
                    *) pid=$kafka address=$theirs ;;
                esac
                if [[ $broker == flushing ]]; then
                    ((FLUSH)) || continue
                    topic+=-flushed
                fi
                if [[ $broker != taffrail ]]; then
                    settings=()
                    [[ $broker == kafka ]] || settings=(--config flush.messages=1)
                    tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$theirs" --create --topic "$topic" \
                        --partitions "$PARTITIONS" "${settings[@]}" >/dev/null 2>&1
                    kill -STOP "$taffrail"
                else
                    kcat -b "$ours" -L -t "$topic" >/dev/null 2>&1 || true
                fi
                # Round 0 warms up Java's compilers, caches and files.
                name=$broker
                ((round > 0)) || name=warm
                measure "$name" "$pid" "$client" produce "$address" "$topic" "$size" "$count"
                [[ $broker == flushing ]] || measure "$name" "$pid" "$client" consume "$address" "$topic" "$size" "$count"
                kill -CONT "$taffrail"
            done
        done
    done
done
by_thread=$(threads "$taffrail")
ours_mib=$(memory "$taffrail") theirs_mib=$(memory "$kafka")

printf '%-9s %-8s %-8s %6s %12s %26s\n' broker client mode bytes 'messages/s' 'CPU s a million messages'
# shellcheck disable=SC2086 # lists of numbers
for key in "${!result[@]}"; do
    [[ $key == *rate && $key != warm* ]] || continue
    read -r broker client mode size _ <<<"$key"
    printf '%-9s %-8s %-8s %6s %12.0f %26.3f\n' "$broker" "$client" "$mode" "$size" "$(median ${result[$key]})" \
        "$(median ${result[${key% rate} cpu]})"
done | sort
echo "Taffrail's CPU by thread: $by_thread"
echo "peak memory: Taffrail $ours_mib MiB, Kafka $theirs_mib MiB"

# ratio MODE FIELD CLIENT WORST: Taffrail's ÷ Kafka's over the sizes, the worst of them.
ratio() {
    local size
    # shellcheck disable=SC2086
    for size in $SIZES; do
        awk -v a="$(median ${result["taffrail $3 $1 $size $2"]})" -v b="$(median ${result["kafka $3 $1 $size $2"]})" \
            'BEGIN { printf "%.2f\n", a / b }'
    done | sort -g | "$4" -n 1
}
status=0
for client in $CLIENTS; do
    # Consuming is recorded; the bars are of producing, that of throughput where the client is not the limit.
    echo "consuming, $client: $(ratio consume rate "$client" head) of Kafka's throughput, $(ratio consume cpu "$client" tail) of its CPU"
    if [[ $client == own ]]; then
        verdict "kafka-throughput-$client" "$(ratio produce rate "$client" head)" 2 || status=1
    else
        echo "producing, $client: $(ratio produce rate "$client" head) of Kafka's throughput; the client is the limit"
    fi
    verdict "kafka-cpu-$client" "$(ratio produce cpu "$client" tail)" 0.5 at-most || status=1
done
verdict kafka-memory "$(awk -v a="$ours_mib" -v b="$theirs_mib" 'BEGIN { printf "%.2f", a / b }')" 0.5 at-most || status=1
exit "$status"
