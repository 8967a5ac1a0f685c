#!/usr/bin/env bash
# bind-nics.sh - hands NICs to DPDK and gives them back to the kernel.
#
# usage: scripts/bind-nics.sh [show]
#        sudo scripts/bind-nics.sh bind NIC... [--driver vfio-pci|uio_pci_generic] [--group] [--force] [--no-iommu]
#        sudo scripts/bind-nics.sh unbind NIC...
#        sudo scripts/bind-nics.sh undo
#
#   NIC       PCI address (0000:3b:00.0 or 3b:00.0), or the name of its kernel interface
#   show      every NIC: address, driver, interface, NUMA node, IOMMU group, link, which DPDK driver takes it
#   bind      takes the NIC from its kernel driver; checks all of them before it changes one
#   unbind    gives the NIC back to the kernel driver it had
#   undo      gives back everything that `bind` took since the machine started
#
#   --driver  vfio-pci (default), or uio_pci_generic where there is no IOMMU
#   --group   also binds the other NICs of the same IOMMU group, which only go together
#   --force   also binds a NIC whose interface has addresses, is part of a bond or bridge, or carries the
#             ssh session; never one that carries a default route
#   --no-iommu  vfio-pci without an IOMMU: the NIC can then write to any memory of this machine
#
# Bindings last until the next start of the machine (`driverctl` makes them permanent); what they replace is
# remembered in /run/taffrail/bind-nics. Can be run again: what is as it should be stays as it is.

set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

DEVICES=/sys/bus/pci/devices
DRIVERS=/sys/bus/pci/drivers
# One line a bound NIC: address, the driver it had (- for none), the interface it had (-), the driver it got.
STATE=/run/taffrail/bind-nics
NO_IOMMU=/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
# DPDK works beside these kernel drivers (bifurcated); the kernel keeps the NIC.
BIFURCATED=(mlx4_core mlx5_core mana)
# Drivers that hand a device to a user-space process.
USER_DRIVERS=(vfio-pci uio_pci_generic igb_uio)

usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$script"; exit 2; }
one_of() { local x=$1 y; shift; for y in "$@"; do [[ $x != "$y" ]] || return 0; done; return 1; }
# Whether $1 is one of the lines of $2.
listed() { [[ $'\n'$2$'\n' == *$'\n'"$1"$'\n'* ]]; }

# --- what sysfs says -----------------------------------------------------------------------------

link_name() { local target; target=$(readlink "$1") || return 0; echo "${target##*/}"; }
driver_of() { link_name "$DEVICES/$1/driver"; }
group_of() { link_name "$DEVICES/$1/iommu_group"; }
class_of() { local class=; read -r class <"$DEVICES/$1/class" || true; echo "$class"; }
is_nic() { [[ $(class_of "$1") == 0x02* ]]; }
nics() { local path; for path in "$DEVICES"/*; do is_nic "${path##*/}" && echo "${path##*/}"; done; true; }

# The kernel interfaces of a device; those of a virtio device hang one level deeper.
interfaces_of() {
    local path
    for path in "$DEVICES/$1"/net/* "$DEVICES/$1"/virtio*/net/*; do
        [[ ! -e $path ]] || echo "${path##*/}"
    done
}

# relatives lower|upper INTERFACE: it, and all interfaces below or above it (bonds, bridges, VLANs).
relatives() {
    local path
    echo "$2"
    for path in "/sys/class/net/$2/$1"_*; do
        [[ ! -e $path ]] || relatives "$1" "${path##*/"$1"_}"
    done
}

# The IOMMU group's devices that must go together: bridges excepted, which vfio leaves to the kernel.
group_members() {
    local group path
    group=$(group_of "$1")
    [[ -n $group ]] || { echo "$1"; return; }
    for path in /sys/kernel/iommu_groups/"$group"/devices/*; do
        [[ $(class_of "${path##*/}") == 0x06* ]] || echo "${path##*/}"
    done
}
has_iommu() {
    local group name=
    group=$(group_of "$1")
    [[ -n $group ]] || return 1
    read -r name 2>/dev/null <"/sys/kernel/iommu_groups/$group/name" || true
    [[ $name != vfio-noiommu ]]
}

# Which DPDK drivers there are, a line each: "VENDOR DEVICE NAME", numbers decimal as in the libraries.
PMD_IDS=
pmd_ids() {
    local folder
    [[ -z $PMD_IDS ]] || return 0
    for folder in /usr/lib/*/dpdk/pmds-* /usr/local/lib/*/dpdk/pmds-*; do
        [[ -d $folder ]] || continue
        # Each library holds PMD_INFO_STRING= {"name": "net_x", ..., "pci_ids": [[vendor, device, ...], ...]}
        PMD_IDS=$(grep -aoh 'PMD_INFO_STRING= {[^}]*}' "$folder"/librte_net_*.so | tr -d ' ' |
            awk '{
                if (!match($0, /"name":"[^"]*"/)) next
                name = substr($0, RSTART + 8, RLENGTH - 9)
                sub(/.*"pci_ids":\[/, "")
                n = split($0, ids, "]")
                for (i = 1; i <= n; i++) { gsub(/[^0-9,]/, "", ids[i]); sub(/^,/, "", ids[i])
                    if (split(ids[i], id, ",") >= 2) print id[1], id[2], name }
            }' | sort -u)
        return
    done
    PMD_IDS=none
}

# The DPDK driver that takes the device: "no" when there is none, "?" where DPDK is not installed.
pmd_of() {
    local vendor device name
    pmd_ids
    [[ $PMD_IDS != none ]] || { echo '?'; return; }
    vendor=$(($(<"$DEVICES/$1/vendor"))) device=$(($(<"$DEVICES/$1/device")))
    name=$(awk -v v="$vendor" -v d="$device" '$1 == v && ($2 == d || $2 == 65535) { print $3; exit }' <<<"$PMD_IDS")
    echo "${name:-no}"
}

# Processes that have the device open through vfio or uio, as "PID (name)"; nothing when there is none.
users_of() {
    local file group path pid
    group=$(group_of "$1")
    local -a files=()
    [[ -z $group ]] || files+=("/dev/vfio/$group" "/dev/vfio/noiommu-$group")
    for path in "$DEVICES/$1"/uio/uio*; do [[ ! -e $path ]] || files+=("/dev/${path##*/}"); done
    ((${#files[@]} > 0)) || return 0
    local -a names=()
    for file in "${files[@]}"; do names+=(-o -lname "$file"); done
    # Processes that end meanwhile are not of interest.
    { find /proc/[0-9]*/fd -maxdepth 1 \( "${names[@]:1}" \) 2>/dev/null || true; } | cut -d/ -f3 | sort -un |
        while read -r pid; do echo "$pid ($(cat "/proc/$pid/comm" 2>/dev/null || true))"; done | paste -sd, -
}

# --- what must not be taken ----------------------------------------------------------------------

# Interfaces of every default route, IPv4 and IPv6, in any table, and what carries those interfaces.
default_route_interfaces() {
    local name
    # Where IPv6 is off, the second call fails; there is no route then.
    { ip -4 route show table all default; ip -6 route show table all default || true; } 2>/dev/null |
        awk '{ for (i = 1; i < NF; i++) if ($i == "dev" && !seen[$(i + 1)]++) print $(i + 1) }' |
        while read -r name; do
            # An unreachable default route names lo.
            [[ $name == lo ]] || relatives lower "$name"
        done
}

# Addresses of an interface and of what is built on it, link-local IPv6 (which each interface has) left out.
addresses_of() {
    local name
    for name in $(relatives upper "$1" | sort -u); do
        ip -o addr show dev "$name" 2>/dev/null | awk '$3 ~ /^inet/ && !($3 == "inet6" && $4 ~ /^fe80:/) { print $4 }'
    done
}

# Local addresses of ssh sessions: this one, and those that sudo or a terminal multiplexer hides.
ssh_addresses() {
    local -a words
    read -r -a words <<<"${SSH_CONNECTION:-}"
    ((${#words[@]} < 3)) || echo "${words[2]}"
    ss -Htn state established '( sport = :22 )' 2>/dev/null | awk '{ sub(/:[0-9]+$/, "", $3); gsub(/[][]/, "", $3); print $3 }' || true
}

# Why the interface must not be taken: "never REASON" or "force REASON"; nothing when it may be.
objection() {
    local name=$1 addresses address ssh uppers
    if listed "$name" "$(default_route_interfaces)"; then
        echo "never carries a default route (ip route; ip -6 route): this machine would go off the network"
        return
    fi
    addresses=$(addresses_of "$name")
    ssh=$(ssh_addresses)
    for address in $addresses; do
        if listed "${address%%/*}" "$ssh"; then
            echo "force carries an ssh session (to ${address%%/*})"
            return
        fi
    done
    uppers=$(relatives upper "$name" | tail -n +2 | paste -sd' ' -)
    if [[ -n $addresses ]]; then
        echo "force has addresses (${addresses//$'\n'/, }${uppers:+; on it: $uppers}), so this machine uses it"
    elif [[ -n $uppers ]]; then
        echo "force is part of $uppers"
    fi
}

# --- state ---------------------------------------------------------------------------------------

state_line() { [[ ! -e $STATE ]] || awk -v nic="$1" '$1 == nic' "$STATE"; }
state_add() { state_drop "$1"; echo "$*" >>"$STATE"; }
state_drop() {
    [[ -e $STATE ]] || return 0
    awk -v nic="$1" '$1 != nic' "$STATE" >"$STATE.new"
    mv "$STATE.new" "$STATE"
}
# One at a time: two runs would mix up what they remember.
lock() {
    mkdir -p "${STATE%/*}"
    exec {lock}>"$STATE.lock"
    flock -w 60 "$lock" || die "another bind-nics.sh is running"
}

# --- actions -------------------------------------------------------------------------------------

# The PCI address of a NIC named by address or interface.
resolve() {
    local text=$1 path
    if [[ -e /sys/class/net/$text && $text != */* ]]; then
        path=$(realpath "/sys/class/net/$text/device" 2>/dev/null) || die "$text is no PCI NIC, but a virtual interface"
        # The nearest PCI device above: an interface of a virtio device hangs below one.
        while [[ $path != / && ! -e $DEVICES/${path##*/} ]]; do path=$(dirname "$path"); done
        [[ $path != / ]] || die "$text is no PCI NIC"
        echo "${path##*/}"
        return
    fi
    text=${text,,}
    [[ $text != [0-9a-f][0-9a-f]:* ]] || text=0000:$text
    [[ $text =~ ^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$ ]] || die "$1 is neither a PCI address nor an interface; scripts/bind-nics.sh show lists them"
    [[ -e $DEVICES/$text ]] || die "there is no PCI device $text; scripts/bind-nics.sh show lists the NICs"
    echo "$text"
}

show() {
    local nic driver pmd link interface interfaces format='%-13s %-16s %-12s %-5s %-12s %-18s %s\n' node group
    local routes
    routes=$(default_route_interfaces)
    # shellcheck disable=SC2059
    printf "$format" address driver interface node 'IOMMU group' link DPDK
    for nic in $(nics); do
        driver=$(driver_of "$nic")
        interfaces=$(interfaces_of "$nic" | paste -sd, -)
        link=-
        for interface in ${interfaces//,/ }; do
            link=$(cat "/sys/class/net/$interface/operstate" 2>/dev/null || echo '?')
            local speed=
            speed=$(cat "/sys/class/net/$interface/speed" 2>/dev/null) || true
            [[ ! $speed =~ ^[1-9] ]] || link+=" $speed Mbit/s"
        done
        read -r node <"$DEVICES/$nic/numa_node" || node=-1
        [[ $node != -1 ]] || node=-
        group=$(group_of "$nic")
        [[ -z $group ]] || has_iommu "$nic" || group="$group (unsafe)"
        pmd=$(pmd_of "$nic")
        if one_of "${driver:--}" "${BIFURCATED[@]}"; then
            pmd+=" (stays with its kernel driver: never bind)"
        else
            for interface in ${interfaces//,/ }; do
                if listed "$interface" "$routes"; then pmd+=" (carries the default route: not to be bound)"; fi
            done
        fi
        [[ -z $(state_line "$nic") ]] || pmd+=" (bound here; was $(state_line "$nic" | awk '{ print $2 }'))"
        # shellcheck disable=SC2059
        printf "$format" "$nic" "${driver:--}" "${interfaces:--}" "$node" "${group:--}" "$link" "$pmd"
    done
}

# attach NIC DRIVER: takes it from the driver it has and gives it to that one (by driver_override, which touches
# no other device of the same kind).
attach() {
    local nic=$1 driver=$2
    echo "$driver" >"$DEVICES/$nic/driver_override"
    [[ ! -e $DEVICES/$nic/driver ]] || echo "$nic" >"$DEVICES/$nic/driver/unbind"
    echo "$nic" >/sys/bus/pci/drivers_probe 2>/dev/null || true
    [[ $(driver_of "$nic") == "$driver" ]]
}

# give_back NIC DRIVER: to that kernel driver; "-" leaves it without one, "" lets the kernel choose.
give_back() {
    local nic=$1 driver=$2
    [[ ! -e $DEVICES/$nic/driver ]] || echo "$nic" >"$DEVICES/$nic/driver/unbind"
    echo >"$DEVICES/$nic/driver_override"
    [[ $driver != - ]] || return 0
    [[ -z $driver || -d $DRIVERS/$driver ]] || modprobe -q "$driver" || true
    if [[ -n $driver && -d $DRIVERS/$driver ]]; then
        echo "$nic" >"$DRIVERS/$driver/bind" 2>/dev/null || true
    else
        modprobe -qb "$(<"$DEVICES/$nic/modalias")" || true
        echo "$nic" >/sys/bus/pci/drivers_probe 2>/dev/null || true
    fi
    if [[ -n $driver ]]; then [[ $(driver_of "$nic") == "$driver" ]]; else [[ -n $(driver_of "$nic") ]]; fi
}

# refusals NIC: prints why it cannot be bound; nothing when it can.
refusals() {
    local nic=$1 driver interface reason
    driver=$(driver_of "$nic")
    if ! is_nic "$nic"; then
        echo "$nic is no NIC (PCI class $(class_of "$nic"))"
        return
    fi
    if one_of "${driver:--}" "${BIFURCATED[@]}"; then
        echo "$nic is driven by $driver, which must keep it: DPDK works beside that driver. Name the address or the interface in taffrail.toml as it is; there is nothing to bind"
        return
    fi
    for interface in $(interfaces_of "$nic"); do
        reason=$(objection "$interface")
        case $reason in
            never*) echo "$nic: its interface $interface ${reason#* }. Not done, not even with --force" ;;
            force*) ((force)) || echo "$nic: its interface $interface ${reason#* }. --force binds it nevertheless; the addresses are lost" ;;
        esac
    done
    if [[ $target == vfio-pci ]] && ! has_iommu "$nic" && ! ((no_iommu)); then
        echo "$nic has no IOMMU: switch on VT-d or AMD-Vi in the BIOS and boot with intel_iommu=on iommu=pt (AMD: iommu=pt); else --driver uio_pci_generic, or --no-iommu, with which the NIC can write to any memory"
    fi
}

bind() {
    local -a chosen=() problems=() others=()
    local nic member driver name interface users
    for name in "$@"; do
        nic=$(resolve "$name")
        one_of "$nic" "${chosen[@]}" || chosen+=("$nic")
    done
    if ((group)); then
        for nic in "${chosen[@]}"; do
            for member in $(group_members "$nic"); do
                is_nic "$member" || continue
                one_of "$member" "${chosen[@]}" || chosen+=("$member")
            done
        done
    fi
    for nic in "${chosen[@]}"; do
        [[ $(driver_of "$nic") != "$target" ]] || continue
        mapfile -t -O "${#problems[@]}" problems < <(refusals "$nic")
        users=
        if one_of "$(driver_of "$nic")" "${USER_DRIVERS[@]}"; then users=$(users_of "$nic"); fi
        [[ -z $users ]] || problems+=("$nic is in use by process $users: stop it first")
        if [[ $target != vfio-pci ]] || ! has_iommu "$nic"; then continue; fi
        # vfio opens a group only when each of its devices is without a driver or with vfio.
        others=()
        for member in $(group_members "$nic"); do
            driver=$(driver_of "$member")
            one_of "$member" "${chosen[@]}" || [[ -z $driver || $driver == vfio-pci ]] || others+=("$member ($driver)")
        done
        ((${#others[@]} == 0)) || problems+=("$nic shares IOMMU group $(group_of "$nic") with ${others[*]}: they only go together. --group binds the NICs among them too; else put the card into a slot with an IOMMU group of its own")
    done
    if ((${#problems[@]} > 0)); then
        printf 'bind-nics.sh: %s\n' "${problems[@]}" >&2
        die "nothing has been changed"
    fi

    modprobe -q "$target" || [[ -d $DRIVERS/$target ]] || die "the kernel has no $target (modprobe $target): install the distribution's full kernel package"
    if [[ $target == vfio-pci ]] && ((no_iommu)); then
        for nic in "${chosen[@]}"; do
            has_iommu "$nic" && continue
            echo "bind-nics.sh: WARNING: no IOMMU protects this machine from $nic: it, and every program that may open it, can read and write all memory" >&2
            [[ -e $NO_IOMMU ]] || die "this kernel has no no-IOMMU mode (CONFIG_VFIO_NOIOMMU): use --driver uio_pci_generic"
            if [[ $(<$NO_IOMMU) != Y ]]; then
                echo 1 >"$NO_IOMMU"
                state_add no-iommu - - -
            fi
        done
    fi
    for nic in "${chosen[@]}"; do
        driver=$(driver_of "$nic")
        if [[ $driver == "$target" ]]; then
            echo "$nic is bound to $target already"
            continue
        fi
        interface=$(interfaces_of "$nic" | paste -sd, -)
        # Remembered before it is done; the driver of before an earlier binding stays the one to go back to.
        name=$(state_line "$nic" | awk '{ print $2, $3 }')
        if [[ -n $name ]] && one_of "${driver:--}" "${USER_DRIVERS[@]}"; then
            read -r member interface <<<"$name"
        else
            member=${driver:--}
        fi
        state_add "$nic" "$member" "${interface:--}" "$target"
        if attach "$nic" "$target"; then
            echo "$nic: ${driver:-no driver}${interface:+ ($interface)} -> $target, NUMA node $(<"$DEVICES/$nic/numa_node")"
        else
            give_back "$nic" "$member" || true
            state_drop "$nic"
            die "$target does not take $nic (dmesg says why); it is with $(driver_of "$nic") again"
        fi
    done
}

# release NIC: back to the driver it had.
release() {
    local nic=$1 line driver current users interface
    line=$(state_line "$nic")
    current=$(driver_of "$nic")
    if [[ ! -e $DEVICES/$nic ]]; then
        echo "$nic has left the machine"
        state_drop "$nic"
        return
    fi
    if [[ -n $current ]] && ! one_of "$current" "${USER_DRIVERS[@]}"; then
        echo "$nic is with its kernel driver $current already"
        state_drop "$nic"
        return
    fi
    users=$(users_of "$nic")
    # The kernel would wait for them without end.
    [[ -z $users ]] || { echo "bind-nics.sh: $nic is in use by process $users: stop it first" >&2; return 1; }
    driver=$(awk '{ print $2 }' <<<"$line")
    one_of "${driver:--}" "${USER_DRIVERS[@]}" && driver=
    if ! give_back "$nic" "$driver"; then
        echo "bind-nics.sh: $nic does not go back to ${driver:-a kernel driver} (dmesg says why); its driver now: $(driver_of "$nic")" >&2
        return 1
    fi
    state_drop "$nic"
    interface=$(interfaces_of "$nic" | paste -sd, -)
    echo "$nic: ${current:-no driver} -> $(driver_of "$nic")${interface:+ ($interface; it is down and has no addresses until it is configured)}"
}

unbind() {
    local name nic failed=0
    for name in "$@"; do
        nic=$(resolve "$name")
        is_nic "$nic" || die "$nic is no NIC (PCI class $(class_of "$nic"))"
        release "$nic" || failed=1
    done
    return "$failed"
}

undo() {
    local nic failed=0
    local -a nics=()
    [[ ! -e $STATE ]] || mapfile -t nics < <(awk '$1 != "no-iommu" { print $1 }' "$STATE")
    for nic in "${nics[@]}"; do release "$nic" || failed=1; done
    if ((failed == 0)) && [[ -n $(state_line no-iommu) ]]; then
        echo 0 >"$NO_IOMMU"
        state_drop no-iommu
        echo "vfio's no-IOMMU mode is off again"
    fi
    ((${#nics[@]} > 0)) || echo "nothing is bound"
    return "$failed"
}

action=show target=vfio-pci force=0 group=0 no_iommu=0
names=()
if (($# > 0)); then action=$1; shift; fi
while (($# > 0)); do
    case $1 in
        --driver) target=${2:-}; shift || usage ;;
        --force) force=1 ;;
        --group) group=1 ;;
        --no-iommu) no_iommu=1 ;;
        -*) usage ;;
        *) names+=("$1") ;;
    esac
    shift
done
one_of "$target" vfio-pci uio_pci_generic || die "--driver $target is not allowed; vfio-pci and uio_pci_generic are"
command -v ip >/dev/null || die "needs ip (package iproute2): without it the default route cannot be seen"
case $action in
    show) ((${#names[@]} == 0)) || usage; show ;;
    bind) ((${#names[@]} > 0)) || usage; need_root; lock; bind "${names[@]}" ;;
    unbind) ((${#names[@]} > 0)) || usage; need_root; lock; unbind "${names[@]}" ;;
    undo) ((${#names[@]} == 0)) || usage; need_root; lock; undo ;;
    *) usage ;;
esac
