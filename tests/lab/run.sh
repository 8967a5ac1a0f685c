#!/usr/bin/env bash
# run.sh - the tests that need real PCI NICs, in guests of scripts/lab.sh; called by scripts/test.sh --lab.
#
# usage: sudo tests/lab/run.sh [BINARY]
#
# BINARY is the server that the guests run, target/debug/taffrail if there is none given. Prints "ok N - TEXT" and
# "not ok N - TEXT", and the count "1..N"; exit status 0 if all are ok. Some minutes; what a failed run leaves for a
# look is in target/lab/test.*.

set -u -o pipefail
cd "$(dirname "$0")/../.." || exit 1
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
# Seconds for one guest: several times what it takes, for a machine that has other work as well.
LIMIT=1800
# What scripts/lab.sh ends with when QEMU does not come to its own end.
CRASHED=126

need_root
taffrail=${1:-target/debug/taffrail}
[[ -x $taffrail ]] || die "$taffrail is missing: cargo build"
taffrail=$(realpath "$taffrail")
mkdir -p target/lab
share=$(mktemp -d "$PWD/target/lab/test.XXXXXX") || exit 1
results=$share/results
: >"$results"
# The emulator's clock is the host's, which the kernel need not compare with slower ones; and timers of whole ticks: a loop
# that sleeps for microseconds would do nothing else, since each wake-up takes that long here.
APPEND="tsc=reliable highres=off"

# guest NAME SCRIPT [SETTING...]: boots one, with these settings of lab.sh; what it prints, and why it has no end. One whose
# emulator crashes, as QEMU 7.2 now and then does with an IOMMU and several CPUs, is booted once more.
guest() {
    local name=$1 script=$2 status=0 attempt log
    shift 2
    for attempt in 1 2; do
        mkdir "$share/$name"
        status=0
        env LAB_SHARE="$share/$name" LAB_PEER=tests/lab/peer.sh LAB_TIMEOUT="$LIMIT" LAB_APPEND="$APPEND" "$@" \
            scripts/lab.sh run "bash $script $taffrail" 2>&1 || status=$?
        ((attempt == 1 && status == CRASHED)) || break
        echo "# guest $name: the emulator crashed, once more"
        mv "$share/$name" "$share/$name.crashed"
    done
    if ((status != 0)); then
        echo "not ok - guest $name comes to its end (status $status)"
        for log in console qemu peer; do
            [[ ! -s $share/$name/$log.log ]] || tail -n 30 "$share/$name/$log.log" | sed "s/^/#   $log: /"
        done
    fi
}
# Gives the checks in a guest's output their numbers.
number() {
    local line
    while IFS= read -r line; do
        if [[ $line =~ ^((not )?ok)\ -\ (.*) ]]; then
            line="${BASH_REMATCH[1]} $(($(wc -l <"$results") + 1)) - ${BASH_REMATCH[3]}"
            printf '%s\n' "$line" >>"$results"
        fi
        printf '%s\n' "$line"
    done
}

# Side by side, since a guest mostly does one thing after another.
guest no-iommu tests/lab/no-iommu.sh LAB_NICS=e1000e:0 LAB_IOMMU=0 LAB_DISK=512 >"$share/second" &
guest nics tests/lab/guest.sh LAB_NICS="e1000e:0 virtio:1:4 e1000:0 e1000:0" LAB_DISK=1024 | number
wait
number <"$share/second"

count=$(wc -l <"$results")
echo "1..$count"
if grep -q '^not ok' "$results" || ((count == 0)); then
    echo "# logs: $share"
    exit 1
fi
rm -rf "$share"
