#!/usr/bin/env bash
# no-iommu.sh - a machine without an IOMMU: the script refuses vfio-pci, and serves by uio_pci_generic.
#
# Runs as root in the guest of scripts/lab.sh (LAB_IOMMU=0) with one e1000e NIC; see guest.sh.

set -u
# shellcheck source=tests/lab/lib.sh
. tests/lab/lib.sh "$1"

# Debian's kernels are built without the mode; then nothing must have changed.
unsafe_mode() {
    local parameter=/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
    if scripts/bind-nics.sh bind "$intel" --no-iommu >"$work/said" 2>&1; then
        [[ $(driver_of "$intel") == vfio-pci ]] && scripts/bind-nics.sh undo && [[ $(<"$parameter") == N ]] || return 1
    else
        grep -q 'has no no-IOMMU mode' "$work/said" || { cat "$work/said"; return 1; }
    fi
    grep -q 'WARNING: no IOMMU protects' "$work/said" && same "$(driver_of "$intel")" e1000e
}

disk_and_peer
intel_if=$(interface_of 01)
intel=$(pci_of "$intel_if")
cat >"$config" <<TOML
[storage]
path = "$data"
segment_size = "32MiB"
[eal]
file_prefix = "lab"
[control]
socket = "$socket"
[[port]]
name = "nic1"
device = "$intel"
addresses = ["10.77.1.2/24"]
[[topic]]
name = "orders"
partitions = 2
[datagram]
udp_port = 9700
TOML
echo 'node=all size=2M count=192' >"$pages"
check "no IOMMU: huge pages" scripts/hugepages.sh --config "$pages"
check "no IOMMU: bind refuses, and says what there is to do" refuses 'has no IOMMU: switch on VT-d' scripts/bind-nics.sh bind "$intel"
check "no IOMMU: --no-iommu warns, and binds or says that the kernel has no such mode" unsafe_mode
check "no IOMMU: uio_pci_generic takes the NIC" says "^$intel: e1000e .* -> uio_pci_generic" scripts/bind-nics.sh bind "$intel" --driver uio_pci_generic
check "no IOMMU: serve" start
check "no IOMMU: pings" pings 10.77.1.2
check "no IOMMU: acknowledged messages" orders 10.77.1.2:9700 1 100
check "no IOMMU: the accounts add up" within 20 adds_up
check "no IOMMU: they are read back" has orders 2 order 100 --socket "$socket"
check "no IOMMU: SIGTERM stops the server" stop
check "no IOMMU: undo gives the NIC back" says "^$intel: uio_pci_generic -> e1000e" scripts/bind-nics.sh undo
umount "$disk"
