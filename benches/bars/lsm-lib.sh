#!/usr/bin/env bash
# What the bars of the store share, behind lib.sh: the bench, a folder on the disk, fio's figures.

command -v fio >/dev/null || die "needs fio (apt-get install fio)"
command -v jq >/dev/null || die "needs jq (apt-get install jq)"

DIR=${DIR:-target}
mkdir -p "$DIR"
disk=$(mktemp -d "$DIR/lsm-bar.XXXXXX")
UNDO+=("rm -rf '$disk'")

[[ -n ${LSM_BENCH:-} ]] || LSM_BENCH=$(built lsm cargo build --release --bench lsm --message-format=json)
[[ -x $LSM_BENCH ]] || die "no program $LSM_BENCH"

# figure JSON-KEY COMMAND...: a number of what the bench prints.
figure() {
    local key=$1
    shift
    "$LSM_BENCH" "$@" | tee /dev/stderr | jq ".$key"
}

# fio_read BLOCKSIZE RW DEPTH FILE SECONDS KEY: the disk's own figure, with O_DIRECT.
fio_read() {
    fio --name=read --filename="$4" --readonly --rw="$2" --bs="$1" --direct=1 --ioengine=io_uring --iodepth="$3" \
        --time_based --runtime="$5" --output-format=json | jq ".jobs[0].read.$6"
}
