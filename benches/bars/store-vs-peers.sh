#!/usr/bin/env bash
# store-vs-peers.sh - Taffrail's store beside the crates fjall and rocksdb, on the same work in the same run: messages a second
# appended (synced each BATCH; and until all is in sorted files), read singly by offset (hot, one thread; cold, DEPTH threads), looked
# up by key, and read in order (from memory; cold). Of each the ratio Taffrail ÷ the better of the two; RATIO is the smallest.
#
# The rules are in benches/peers/src/main.rs. Hot: among the first HOT offsets, read before. Cold: the page cache is emptied of the
# store first, and single messages are read within COLD_MIB of memory, page cache and the stores' own caches of 64 MiB included, by a control
# group: a store that fits in memory would soon be warm. The stores take turns; each figure is the median of ROUNDS. Builds benches/peers unless PEERS_BENCH names the
# program: with Debian's RocksDB where librocksdb-dev is installed, else with RocksDB's C++, half an hour of CPU. Needs clang, for its bindings.
# Settings: ROUNDS (3), MESSAGES (4000000), COLD_MIB (256), BATCH (1000), HOT (100000), DEPTH (8), SECONDS_EACH (5), STORES, BAR (1), DIR.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh

command -v jq >/dev/null || die "needs jq (apt-get install jq)"
ROUNDS=${ROUNDS:-3}
MESSAGES=${MESSAGES:-4000000}
HOT=${HOT:-100000}
DEPTH=${DEPTH:-8}
each=${SECONDS_EACH:-5}
read -ra stores <<<"${STORES:-taffrail fjall rocksdb}"
DIR=${DIR:-target}
mkdir -p "$DIR"
disk=$(mktemp -d "$DIR/peers-bar.XXXXXX")
UNDO+=("rm -rf '$disk'")
if [[ -z ${PEERS_BENCH:-} ]]; then
    lax=()
    packaged=/usr/lib/$(uname -m)-linux-gnu
    [[ -n ${ROCKSDB_LIB_DIR:-} || ! -e $packaged/librocksdb.so ]] || export ROCKSDB_LIB_DIR=$packaged
    # A library older than the bindings lacks this function, which is not called here.
    [[ -z ${ROCKSDB_LIB_DIR:-} ]] || lax=(-C "link-arg=-Wl,--defsym=rocksdb_write_buffer_manager_destroy=main")
    PEERS_BENCH=$(built taffrail-peers cargo rustc --release --locked --manifest-path benches/peers/Cargo.toml \
        --message-format=json -- "${lax[@]}")
fi
[[ -x $PEERS_BENCH ]] || die "no program $PEERS_BENCH"

# within MIB COMMAND: runs it in a control group of so much memory.
within() {
    local mib=$1 group limit
    shift
    if [[ -d /sys/fs/cgroup/memory ]]; then
        group=/sys/fs/cgroup/memory/taffrail-peers.$$ limit=memory.limit_in_bytes
    else
        group=/sys/fs/cgroup/taffrail-peers.$$ limit=memory.max
    fi
    if ! mkdir -p "$group" || ! echo "${mib}M" >"$group/$limit"; then
        die "cannot limit memory by a control group in $group: run as root"
    fi
    (echo "$BASHPID" >"$group/cgroup.procs" && exec "$@")
    rmdir "$group"
}

declare -A figures
# note NAME STORE FIGURE: another round's.
note() { figures[$1/$2]+=" $(printf %.0f "$3")"; }

# measure NAME STORE ARGUMENTS...: runs the bench on the store.
measure() {
    local name=$1 store=$2 line
    shift 2
    line=$(${within:+within "$within"} "$PEERS_BENCH" "$store" "$disk/$store" "$@" --messages "${among:-$MESSAGES}")
    [[ -n $line ]] || die "$store: $name failed${within:+; within $within MiB: COLD_MIB may be too little}"
    echo "round $round: $store $name $line" >&2
    note "$name" "$store" "$(jq .per_s <<<"$line")"
    [[ $name == append ]] && note settled "$store" "$(jq .settled_per_s <<<"$line")"
    return 0
}

for ((round = 1; round <= ROUNDS; round++)); do
    for store in "${stores[@]}"; do
        rm -rf "${disk:?}/$store"
        measure append "$store" append --batch "${BATCH:-1000}"
        echo "round $round: $store $(du -sm --apparent-size "$disk/$store" | cut -f 1) MiB on disk" >&2
    done
    for store in "${stores[@]}"; do
        forget "$disk/$store"
        within=${COLD_MIB:-256} measure point-cold "$store" point --threads "$DEPTH" --seconds "$each"
    done
    for store in "${stores[@]}"; do
        among=$HOT measure point-hot "$store" point --warm --seconds "$each"
    done
    for store in "${stores[@]}"; do measure key "$store" key --seconds "$each"; done
    for store in "${stores[@]}"; do
        forget "$disk/$store"
        measure scan-cold "$store" scan
    done
    for store in "${stores[@]}"; do measure scan-memory "$store" scan --passes 3; done
done

least=
for name in append settled point-hot point-cold key scan-memory scan-cold; do
    line=$name best=0
    for store in "${stores[@]}"; do
        read -ra rounds <<<"${figures[$name/$store]}"
        value=$(median "${rounds[@]}")
        line+=" $store $value/s"
        if [[ $store == taffrail ]]; then ours=$value; else best=$(printf '%s\n' "$best" "$value" | sort -g | tail -n 1); fi
    done
    ratio=$(awk -v o="$ours" -v b="$best" 'BEGIN { printf "%.2f", b ? o / b : 0 }')
    echo "$line ratio $ratio"
    least=$(printf "%s\n" ${least:+"$least"} "$ratio" | sort -g | head -n 1)
done
verdict store-vs-peers "$least" "${BAR:-1}"
