#!/usr/bin/env bash
# What the guests' scripts share: checks, the way to the host outside, the server and its accounts. Source it with the binary
# that is tested as its argument.
#
# /share/peer is the way to the host at the other end of the cables (tests/lab/peer.sh). A check prints "ok - TEXT" or
# "not ok - TEXT", and what went wrong as "# ..." lines below.

# shellcheck disable=SC2034  # what is not used here is used by those who source it
taffrail=${1:?the binary}
work=/run/lab socket=/run/lab/control.sock config=/run/lab/taffrail.toml pages=/run/lab/hugepages.conf
disk=/run/lab/disk data=/run/lab/disk/data
server=
mkdir -p "$work" "$disk"

# --- what checks are made of ------------------------------------------------------------------------

# check TEXT COMMAND...: ok if the command succeeds, else what it printed.
check() {
    local text=$1 status=0
    shift
    "$@" >"$work/out" 2>&1 || status=$?
    if ((status == 0)); then
        echo "ok - $text"
    else
        echo "not ok - $text"
        echo "# failed ($status): $*"
        tail -n 40 "$work/out" | sed 's/^/#   /'
    fi
}
# says WORDS COMMAND...: it succeeds, and prints the words (a regular expression).
says() {
    local words=$1
    shift
    "$@" >"$work/said" 2>&1 || { cat "$work/said"; return 1; }
    grep -Eq -- "$words" "$work/said" || { echo "no \"$words\" in:"; cat "$work/said"; return 1; }
}
# refuses WORDS COMMAND...: it fails, and prints the words.
refuses() {
    local words=$1
    shift
    if "$@" >"$work/said" 2>&1; then echo "did not fail:"; cat "$work/said"; return 1; fi
    grep -Eq -- "$words" "$work/said" || { echo "no \"$words\" in:"; cat "$work/said"; return 1; }
}
same() { [[ $1 == "$2" ]] || { echo "\"$1\" is not \"$2\""; return 1; }; }
# within SECONDS COMMAND...: succeeds at last.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >"$work/within" 2>&1; do
        ((SECONDS < end)) || { cat "$work/within"; return 1; }
        sleep 0.5
    done
}

# peer COMMAND: on the host at the other end of the cables; its output and exit status.
peer() {
    local name
    name=$(mktemp -u XXXXXXXXXX)
    printf '%s\n' "$1" >"/share/peer/$name.new"
    mv "/share/peer/$name.new" "/share/peer/$name.cmd"
    until [[ -e /share/peer/$name.rc ]]; do sleep 0.2; done
    cat "/share/peer/$name.out"
    return "$(<"/share/peer/$name.rc")"
}
# Until the link is up and both sides know each other pings are lost; then three of three have to come back.
pings() { peer "for i in \$(seq 20); do ping -c 1 -W 2 $1 >/dev/null && break; sleep 0.5; done; ping -c 3 -i 0.3 -W 5 $1 | tee /dev/stderr | grep -q ' 3 received'"; }

# The empty NVMe disk for the store, and the other host ready.
disk_and_peer() {
    until [[ -d /share/peer ]]; do sleep 0.2; done
    if ! { mkfs.ext4 -q -F /dev/nvme0n1 && mount /dev/nvme0n1 "$disk"; }; then
        echo "# no disk"
        exit 1
    fi
}

stats() { "$taffrail" stats --json --socket "$socket"; }
# stat EXPRESSION: of the statistics, by jq.
stat() { stats | jq -r "$1"; }
# What the taps did not hand to the NIC outside of port $1: lost before this machine, and counted there.
tap_dropped() { peer "ip -j -s link show dev lab$1 | jq '.[0].stats64.tx.dropped'"; }

driver_of() { basename "$(readlink "/sys/bus/pci/devices/$1/driver")"; }
# The NIC with MAC address 52:54:00:77:$1:02: its interface, and the PCI address below it.
interface_of() { grep -l "52:54:00:77:$1:02" /sys/class/net/*/address | cut -d/ -f5; }
pci_of() { realpath "/sys/class/net/$1/device" | grep -Eo '[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]' | tail -n 1; }

huge_total() { awk '/^HugePages_Total/ { print $2 }' /proc/meminfo; }
node_pages() { cat "/sys/devices/system/node/node$1/hugepages/hugepages-2048kB/nr_hugepages"; }

start() {
    : >"$work/serve.log"
    "$taffrail" serve --config "$config" >"$work/serve.log" 2>&1 &
    server=$!
    local end=$((SECONDS + 120))
    until grep -q 'taking messages' "$work/serve.log"; do
        kill -0 "$server" 2>/dev/null || { echo "the server has ended:"; cat "$work/serve.log"; return 1; }
        ((SECONDS < end)) || { echo "the server does not get ready:"; cat "$work/serve.log"; return 1; }
        sleep 0.2
    done
    cat "$work/serve.log"
}
# stop: by SIGTERM; the exit status has to be 0, with the closing line.
stop() {
    local status=0 end=$((SECONDS + 60))
    kill -TERM "$server"
    while kill -0 "$server" 2>/dev/null; do
        ((SECONDS < end)) || { echo "does not stop:"; cat "$work/serve.log"; kill -9 "$server"; break; }
        sleep 0.2
    done
    wait "$server" || status=$?
    server=
    cat "$work/serve.log"
    ((status == 0)) || { echo "exit status $status"; return 1; }
    grep -q '^stopped; of ' "$work/serve.log"
}

# Every account adds up and nothing is on its way.
adds_up() {
    stats >"$work/stats.json" || return 1
    jq -e '
        def total: [.[]] | add // 0;
        ([.topics[] | select(.in_flight != 0 or .received != .stored + .duplicate + (.refused | total) + (.dropped | total))]
         + [.ports[] | select(.received != .delivered + (.handled | total) + (.dropped | total) or (.queues | add) != .received)])
        | length == 0' "$work/stats.json" || { cat "$work/stats.json"; return 1; }
}
# arrived TOPIC TAP SENT TAP-DROPPED-BEFORE: all of the sent messages are in the log or under a counter: of the tap
# outside, of the NIC, of the topic.
arrived() {
    local drops
    drops=$(($(tap_dropped "$2") - $4))
    stats >"$work/stats.json"
    jq -e --arg topic "$1" --arg port "nic$2" --argjson sent "$3" --argjson tap "$drops" '
        def total: [.[]] | add // 0;
        (.topics[] | select(.name == $topic)) as $t | (.ports[] | select(.name == $port)) as $p |
        $t.stored > 0 and $sent == $t.stored + ($t.dropped | total) + ($p.nic | total) + $tap' "$work/stats.json" ||
        { echo "sent $3, the tap dropped $drops"; cat "$work/stats.json"; return 1; }
}

# --- traffic, by senders outside ---------------------------------------------------------------------

# raw TO FLOWS COUNT PREFIX: COUNT messages from each of FLOWS sockets: "PREFIX FLOW NUMBER ...".
raw() { peer "for i in \$(seq $2); do $taffrail send-udp --to $1 --count $3 --rate 1000 --prefix \"$4 \$i \" >/dev/null || exit 1; done"; }
# orders TO FIRST LAST: acknowledged messages, one a line.
orders() { peer "seq -f 'order %.0f' $2 $3 | $taffrail produce orders --server $1 --acks all --quiet"; }
# read_all TOPIC PARTITIONS [SOURCE OPTION...]: every message of the topic.
read_all() {
    local topic=$1 partitions=$2 partition
    shift 2
    for ((partition = 0; partition < partitions; partition++)); do
        "$taffrail" read "$topic" --partition "$partition" "$@" || return 1
    done
}
# has TOPIC PARTITIONS PREFIX EXPECTED [SOURCE OPTION...]: that many messages with the prefix are there, each once.
has() {
    local topic=$1 partitions=$2 prefix=$3 expected=$4 all unique
    shift 4
    read_all "$topic" "$partitions" "$@" >"$work/read" || { tail -n 5 "$work/read"; return 1; }
    all=$(grep -c "^$prefix " "$work/read")
    unique=$(grep "^$prefix " "$work/read" | sort -u | wc -l)
    [[ $all == "$expected" && $unique == "$expected" ]] || { echo "$topic: $all messages \"$prefix\", $unique different ones; expected $expected"; return 1; }
}
stored() { stat ".topics[] | select(.name == \"$1\") | .stored"; }
idle() { [[ $(stat '[.topics[].in_flight] | add') == 0 ]]; }
