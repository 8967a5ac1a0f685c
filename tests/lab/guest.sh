#!/usr/bin/env bash
# guest.sh - prepares a bare machine with real PCI NICs, runs the server on them, and gives them back.
#
# Runs as root in the guest of scripts/lab.sh, from the checkout's root; tests/lab/run.sh boots it with an e1000e NIC, a
# virtio NIC with four queues, and two e1000 NICs in one IOMMU group. Exit status 0: it came to its end, whatever the
# checks said.

set -u
# shellcheck source=tests/lab/lib.sh
. tests/lab/lib.sh "$1"

# write_config LAYOUT-LINES VIRTIO-DEVICE
write_config() {
    cat >"$config" <<TOML
[storage]
path = "$data"
segment_size = "32MiB"
[lcores]
$1
[eal]
file_prefix = "lab"
[control]
socket = "$socket"
[[port]]
name = "nic1"
device = "$intel"
addresses = ["10.77.1.2/24", "fd77:1::2/64"]
[[port]]
name = "nic2"
device = "$2"
queues = 4
addresses = ["10.77.2.2/24", "fd77:2::2/64"]
[[topic]]
name = "intel"
[[topic]]
name = "virtio"
partitions = 4
[[topic]]
name = "orders"
partitions = 2
[[udp]]
port = "nic1"
udp_port = 5000
topic = "intel"
[[udp]]
port = "nic2"
udp_port = 5000
topic = "virtio"
[datagram]
udp_port = 9700
TOML
}

# --- the machine as it is -----------------------------------------------------------------------------

disk_and_peer
intel_if=$(interface_of 01) virtio_if=$(interface_of 02)
[[ -n $intel_if && -n $virtio_if ]] || { ip -br link; exit 1; }
intel=$(pci_of "$intel_if") virtio=$(pci_of "$virtio_if")
echo "# $intel: $intel_if, e1000e; $virtio: $virtio_if, virtio"
write_config 'layout = "shared"' "$virtio"

check "show: the e1000e NIC with its driver, node, and DPDK's driver" \
    says "^$intel +e1000e +$intel_if +0 .*net_e1000_em" scripts/bind-nics.sh show
check "show: the virtio NIC likewise" says "^$virtio +virtio-pci +$virtio_if +1 .*net_virtio" scripts/bind-nics.sh
check "serve refuses a bare machine and says what to run" \
    refuses "scripts/hugepages.sh apply" "$taffrail" serve --config "$config"
check "serve names the kernel driver that has the NIC" grep -q "port $intel is bound to e1000e: run .scripts/bind-nics.sh bind $intel" "$work/said"

up() { ip addr add "10.77.$2.2/24" dev "$1" && ip link set "$1" up; }
up "$intel_if" 1
up "$virtio_if" 2
check "the e1000e NIC answers pings by its kernel driver" pings 10.77.1.2
check "the virtio NIC answers pings by its kernel driver" pings 10.77.2.2

# --- huge pages -----------------------------------------------------------------------------------------

umount /dev/hugepages
echo 'node=1 size=2M count=100000' >"$pages"
check "hugepages.sh: more than the node has is refused" \
    refuses 'asks for 200000 MiB on node 1, which has [0-9]+ MiB' scripts/hugepages.sh --config "$pages"
check "hugepages.sh: nothing has been changed by that" same "$(huge_total)" 0
echo 'node=5 size=2M count=1' >"$pages"
check "hugepages.sh: an unknown node is refused by its line" refuses 'line 1: this machine has no NUMA node 5' scripts/hugepages.sh --config "$pages"
printf 'node=1 size=2M count=0\nnode=0 size=2M count=0\nnode=1 size=1G count=1\n' >"$pages"
check "hugepages.sh: a page of 1G on node 1, or what to add to the kernel command line" \
    bash -c "scripts/hugepages.sh --config $pages >$work/said 2>&1; cat $work/said
        grep -Eq '^node 1: 1 pages of 1G asked for, 1 there' $work/said && grep -q '/dev/hugepages-1G' /proc/mounts ||
        grep -q 'hugepagesz=1G hugepages=1:1' $work/said"
printf 'node=1 size=1G count=0\nnode=0 size=2M count=192\nnode=1 size=2M count=224\n' >"$pages"
check "hugepages.sh: pages of 2M by node" says '^node 1: 224 pages of 2M asked for, 224 there' scripts/hugepages.sh --config "$pages"
check "hugepages.sh: node 0 has its number" same "$(node_pages 0)" 192
check "hugepages.sh: node 1 has its number" same "$(node_pages 1)" 224
check "hugepages.sh: mounts a hugetlbfs of 2M pages" grep -Eq '^\S+ /dev/hugepages hugetlbfs .*pagesize=2M' /proc/mounts
before=$(grep hugetlbfs /proc/mounts)
check "hugepages.sh: a second run changes nothing" scripts/hugepages.sh apply --config "$pages"
check "hugepages.sh: the pages are the same" same "$(huge_total) $(grep hugetlbfs /proc/mounts)" "416 $before"
check "hugepages.sh --show: the pages of each node" says '^1 +2M +224 +224 +448' scripts/hugepages.sh --show

if command -v systemctl >/dev/null; then
    unit=/etc/systemd/system/taffrail-hugepages.service
    check "hugepages.sh --at-boot: installs a unit" says '^at boot: taffrail-hugepages.service' scripts/hugepages.sh --at-boot --config "$pages"
    check "hugepages.sh --at-boot: again, without harm" scripts/hugepages.sh --at-boot --config "$pages"
    check "hugepages.sh --at-boot: the unit is enabled for early boot" test -L /etc/systemd/system/sysinit.target.wants/taffrail-hugepages.service
    echo 0 >/proc/sys/vm/nr_hugepages
    command=$(sed -n 's/^ExecStart=//p' "$unit")
    # shellcheck disable=SC2086  # the words of the unit's command
    check "hugepages.sh --at-boot: what the unit runs reserves the pages" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin $command
    check "hugepages.sh --at-boot: after it the pages are there" same "$(node_pages 0) $(node_pages 1)" "192 224"
    check "hugepages.sh --not-at-boot: removes the unit" scripts/hugepages.sh --not-at-boot
    check "hugepages.sh --not-at-boot: nothing of it is left" bash -c "! test -e $unit && ! test -L /etc/systemd/system/sysinit.target.wants/taffrail-hugepages.service"
    check "hugepages.sh --not-at-boot: again, without harm" says 'there was no' scripts/hugepages.sh --not-at-boot
else
    check "hugepages.sh --at-boot: says that there is no systemd" refuses 'there is no systemd' scripts/hugepages.sh --at-boot --config "$pages"
fi

# --- binding ----------------------------------------------------------------------------------------------

check "bind: an interface with addresses is refused" refuses "$intel_if has addresses" scripts/bind-nics.sh bind "$intel_if"
ip addr flush dev "$intel_if"
ip link set "$virtio_if" up
ip route add default via 10.77.2.1 dev "$virtio_if"
check "bind: the interface of the default route is refused" refuses 'carries a default route' scripts/bind-nics.sh bind "$virtio_if"
check "bind: also with --force" refuses 'carries a default route' scripts/bind-nics.sh bind "$virtio" --force
check "bind: beside it nothing is bound either" refuses 'nothing has been changed' scripts/bind-nics.sh bind "$intel" "$virtio" --force
ip route del default
ip -6 addr add fd77:2::2/64 dev "$virtio_if" nodad
ip -6 route add default via fd77:2::1 dev "$virtio_if"
check "bind: nor the interface of the IPv6 default route" refuses 'carries a default route' scripts/bind-nics.sh bind "$virtio_if" --force
check "show: tells that it carries the default route" says "^$virtio .*carries the default route" scripts/bind-nics.sh show
ip -6 route del default
ip link add bridge0 type bridge && ip link set "$virtio_if" master bridge0 && ip link set bridge0 up
ip route add default dev bridge0
check "bind: nor a NIC below the bridge that carries it" refuses 'carries a default route' scripts/bind-nics.sh bind "$virtio_if" --force
ip link del bridge0
ip addr flush dev "$virtio_if"
check "the drivers are as before" same "$(driver_of "$intel") $(driver_of "$virtio")" "e1000e virtio-pci"
check "bind: what is no NIC is refused" refuses 'is no NIC' scripts/bind-nics.sh bind "$(basename "$(realpath /sys/class/nvme/nvme0/device)")"
check "bind: an unknown address is refused" refuses 'there is no PCI device' scripts/bind-nics.sh bind 0000:77:00.0

check "bind: the e1000e NIC by its interface, the virtio NIC by its address" \
    says "^$virtio: virtio-pci \\($virtio_if\\) -> vfio-pci, NUMA node 1" scripts/bind-nics.sh bind "$intel_if" "$virtio"
check "bind: both are with vfio-pci" same "$(driver_of "$intel") $(driver_of "$virtio")" "vfio-pci vfio-pci"
check "bind: a second run changes nothing" says "^$intel is bound to vfio-pci already" scripts/bind-nics.sh bind "$intel" "$virtio"
check "show: tells what was bound, and from which driver" says "^$intel +vfio-pci .*bound here; was e1000e" scripts/bind-nics.sh show

one=$(pci_of "$(interface_of 03)") other=$(pci_of "$(interface_of 04)")
check "bind: a NIC that shares its IOMMU group is refused" refuses "shares IOMMU group [0-9]+ with $other" scripts/bind-nics.sh bind "$one"
check "bind --group: takes both" scripts/bind-nics.sh bind "$one" --group
check "bind --group: both are with vfio-pci" same "$(driver_of "$one") $(driver_of "$other")" "vfio-pci vfio-pci"
check "unbind: both go back" scripts/bind-nics.sh unbind "$one" "$other"
check "unbind: both have their driver" same "$(driver_of "$one") $(driver_of "$other")" "e1000 e1000"

# --- all roles on one core ---------------------------------------------------------------------------------

check "taffrail check accepts the configuration" says 'queues \[nic1:0 nic2:0 nic2:1 nic2:2 nic2:3\]' "$taffrail" check --config "$config"
check "serve: takes both NICs, four queues of the virtio one" start
check "the port of the e1000e NIC answers pings" pings 10.77.1.2
check "the port of the virtio NIC answers pings" pings 10.77.2.2
check "the port of the e1000e NIC answers IPv6 pings" pings fd77:1::2
check "the port of the virtio NIC answers IPv6 pings" pings fd77:2::2
links_up() { same "$(stat '[.ports[].link | select(startswith("up"))] | length')" 2; }
within 30 links_up
check "links are up" same "$(stat '[.ports[].link | select(startswith("up"))] | length')" 2
check "drivers are DPDK's for these devices" same "$(stat '[.ports[].driver] | join(" ")')" "net_e1000_em net_virtio"
dropped1=$(tap_dropped 1) dropped2=$(tap_dropped 2)
check "raw UDP to the e1000e NIC" raw 10.77.1.2:5000 4 500 four
check "raw UDP over IPv6 to the e1000e NIC" raw '[fd77:1::2]:5000' 1 200 six
check "raw UDP of 48 flows to the virtio NIC" raw 10.77.2.2:5000 48 25 four
check "raw UDP over IPv6 to the virtio NIC" raw '[fd77:2::2]:5000' 1 200 six
check "messages acknowledged with acks=all by the e1000e NIC" orders 10.77.1.2:9700 1 400
check "messages acknowledged with acks=all by the virtio NIC" orders 10.77.2.2:9700 401 800
within 30 idle
check "every message sent to the e1000e NIC is in the log or counted" arrived intel 1 2200 "$dropped1"
check "every message sent to the virtio NIC is in the log or counted" arrived virtio 2 1400 "$dropped2"
check "the accounts of ports, queues and topics add up" adds_up
check "taffrail stats says so too" says 'Every account adds up' "$taffrail" stats --socket "$socket"
check "no checksum is taken for bad" same "$(stat '[.ports[].dropped | to_entries[] | select(.key | test("checksum")) | .value] | add // 0')" 0
queues=$(stat '.ports[1].queues | join(" ")')
echo "# packets by queue of the virtio port: $queues"
check "many flows reach more than one queue of the virtio port" \
    test "$(stat '[.ports[1].queues[] | select(. > 0)] | length')" -gt 1
intel_stored=$(stored intel) virtio_stored=$(stored virtio)
echo "# stored: intel $intel_stored, virtio $virtio_stored"
check "the acknowledged messages are read back, each once" has orders 2 order 800 --socket "$socket"
check "the raw messages of the e1000e NIC are read back" has intel 1 four "$((intel_stored - 200))" --socket "$socket"
check "the raw messages of the virtio NIC are read back" has virtio 4 four "$((virtio_stored - 200))" --socket "$socket"

check "unbind: a NIC in use is not taken from the server" refuses "in use by process .*$server" scripts/bind-nics.sh unbind "$intel"
printf 'node=all size=2M count=0\n' >"$work/none.conf"
check "hugepages.sh: pages in use stay" says 'the rest is in use' scripts/hugepages.sh --config "$work/none.conf"
check "the server goes on without the pages it does not use" orders 10.77.1.2:9700 801 850
check "SIGTERM stops the server, exit status 0" stop
check "verify finds the stopped store whole" "$taffrail" verify "$data"
check "the stopped store has every acknowledged message" has orders 2 order 850 --data "$data"
# The kernel lets go of what io_uring had registered some time after the process has ended.
check "hugepages.sh: what the server used comes back" within 30 says '192 there, 192 free' scripts/hugepages.sh --config "$pages"

# --- a core for each role, on the NICs' nodes ---------------------------------------------------------------

write_config 'layout = "spread"' "$virtio"
check "check: each NIC is polled on its own node" bash -c "
    $taffrail check --config $config >$work/said; cat $work/said
    grep -Eq '\(node 0\): queues \[nic1:0\]' $work/said && grep -Eq '\(node 1\): queues \[nic2:0 nic2:1 nic2:2 nic2:3\]' $work/said"
check "serve: starts again on the store, spread over lcores" start
check "spread: two rx lcores and one for storage" same "$(stat '[.lcores[].role] | sort | join(" ")')" "rx rx storage"
dropped1=$(tap_dropped 1) dropped2=$(tap_dropped 2)
check "spread: pings" pings 10.77.1.2
check "spread: raw UDP to the e1000e NIC" raw 10.77.1.2:5000 1 500 again
check "spread: raw UDP to the virtio NIC" raw 10.77.2.2:5000 24 25 again
check "spread: acknowledged messages by the virtio NIC" orders 10.77.2.2:9700 851 1000
within 30 idle
check "spread: every message to the e1000e NIC is in the log or counted" arrived intel 1 500 "$dropped1"
check "spread: every message to the virtio NIC is in the log or counted" arrived virtio 2 600 "$dropped2"
check "spread: the accounts add up" adds_up
echo "# packets by queue of the virtio port: $(stat '.ports[1].queues | join(" ")')"
check "spread: what was stored before is read back as well" has orders 2 order 1000 --socket "$socket"
check "spread: messages of this run" has intel 1 again "$(stored intel)" --socket "$socket"
check "spread: messages of the first run" has virtio 4 four "$((virtio_stored - 200))" --socket "$socket"
check "spread: SIGTERM stops the server" stop
check "spread: verify" "$taffrail" verify "$data"

# --- by MAC address --------------------------------------------------------------------------------------------

write_config 'layout = "shared"' 52:54:00:77:02:02
check "serve: finds a NIC by its MAC address" start
check "by MAC address: acknowledged messages" orders 10.77.2.2:9700 1001 1050
check "by MAC address: the accounts add up" within 20 adds_up
check "the management NIC stays with the kernel" pings 10.77.0.2
check "by MAC address: SIGTERM stops the server" stop

# --- back to the kernel -------------------------------------------------------------------------------------------

check "unbind: the virtio NIC goes back to its driver" says "^$virtio: vfio-pci -> virtio-pci" scripts/bind-nics.sh unbind "$virtio"
check "unbind: a second run changes nothing" says 'with its kernel driver virtio-pci already' scripts/bind-nics.sh unbind "$virtio"
check "undo: gives back the rest" says "^$intel: vfio-pci -> e1000e" scripts/bind-nics.sh undo
check "undo: a second run has nothing to do" says 'nothing is bound' scripts/bind-nics.sh undo
interfaces() { [[ -n $(interface_of 01) && -n $(interface_of 02) ]]; }
check "both interfaces are there again" within 20 interfaces
check "both drivers are the ones of before" same "$(driver_of "$intel") $(driver_of "$virtio")" "e1000e virtio-pci"
up "$(interface_of 01)" 1
up "$(interface_of 02)" 2
check "the e1000e NIC answers pings by its kernel driver again" pings 10.77.1.2
check "the virtio NIC answers pings by its kernel driver again" pings 10.77.2.2
check "hugepages.sh: gives the pages back" scripts/hugepages.sh --config "$work/none.conf"
check "hugepages.sh: none is left" same "$(huge_total)" 0
umount "$disk"
