#!/usr/bin/env bash
# kafka-connections-lab.sh - kafka-connections.sh in a guest of scripts/lab.sh, for machines on which a process may not open
# 100,000 files.
#
# usage: sudo benches/bars/kafka-connections-lab.sh
#
# In the guest root may raise every limit. Its CPUs are emulated, some twenty times slower, so the busy connections send fewer
# messages, and times in ms say nothing; bytes a connection do, and so does the ratio of the busy ones' p99, with care. Prints what
# kafka-connections.sh prints. Settings: as there (RATE 100, SECONDS_EACH 30, PATIENCE 1200 here), LAB_MEM (6144 MiB: both
# ends of 100,000 connections take the guest's kernel about 1 GiB), LAB_TIMEOUT (7200 s). Needs that much free memory.

set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
need_root

settings=
# Other binaries than target/release/'s.
for name in TAFFRAIL OWN; do
    [[ -z ${!name:-} ]] || settings+="$name=$(printf '%q' "${!name}") "
done
for setting in "ROUNDS=${ROUNDS:-3}" "IDLE=${IDLE:-100000}" "BUSY=${BUSY:-1000}" "RATE=${RATE:-100}" \
    "SECONDS_EACH=${SECONDS_EACH:-30}" "THREADS=${THREADS:-1}" "TRANSPORT=${TRANSPORT:-auto}" "PATIENCE=${PATIENCE:-1200}"; do
    settings+="$(printf '%q' "$setting") "
done
# The emulator's clock is the host's, which the kernel need not compare with slower ones.
exec env LAB_MEM="${LAB_MEM:-6144}" LAB_CPUS=2 LAB_NICS=virtio:0 LAB_IOMMU=0 LAB_DISK=4096 LAB_TIMEOUT="${LAB_TIMEOUT:-7200}" \
    LAB_APPEND='tsc=reliable' scripts/lab.sh run "
    mkfs.ext4 -q -F /dev/nvme0n1 && mkdir -p /run/disk && mount /dev/nvme0n1 /run/disk || exit 2
    env DIR=/run/disk $settings benches/bars/kafka-connections.sh
    status=\$?
    umount /run/disk
    exit \$status"
