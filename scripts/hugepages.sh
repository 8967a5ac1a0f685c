#!/usr/bin/env bash
# hugepages.sh - reserves the huge pages that hugepages.conf asks for, on each NUMA node.
#
# usage: sudo scripts/hugepages.sh [apply] [--config FILE]
#             scripts/hugepages.sh --show
#        sudo scripts/hugepages.sh --at-boot [--config FILE] | --not-at-boot
#
#   apply          (also without any word) reserves the pages and mounts hugetlbfs; says what it got
#                  against what was asked. Exit status 1 when a node got fewer, with the remedy.
#   --show         pages of each node and size, and the hugetlbfs mounts
#   --at-boot      applies now, and installs a systemd unit that applies the file at every boot
#   --not-at-boot  removes that unit; pages that are reserved now stay
#   --config FILE  another file than hugepages.conf of this checkout
#
# Can be run again; pages that are in use are never taken away.

set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

NODES=/sys/devices/system/node
UNIT=taffrail-hugepages.service
UNIT_FILE=/etc/systemd/system/$UNIT
# Attempts to get pages, with a compaction of memory before each one but the first.
ATTEMPTS=4
# Most of a node's memory that may go into huge pages; the rest is the kernel's and the programs'.
MOST_PERCENT=90

usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$script"; exit 2; }

kib_of() {
    case $1 in
        2M) echo 2048 ;;
        1G) echo 1048576 ;;
    esac
}
size_of() {
    case $1 in
        2048) echo 2M ;;
        1048576) echo 1G ;;
        *) echo "${1}kB" ;;
    esac
}
nodes() { local path; for path in "$NODES"/node[0-9]*; do echo "${path##*/node}"; done | sort -n; }
read_count() { local count=0; [[ ! -r $1 ]] || read -r count <"$1"; echo "$count"; }

# The mount point of the hugetlbfs with pages of that many KiB; nothing when there is none.
mount_of() {
    awk -v size="$(size_of "$1")" '$3 == "hugetlbfs" {
        split($4, options, ",")
        for (i in options) {
            page = options[i]
            if (sub(/^pagesize=/, "", page)) { if (page == "1024M") page = "1G"; if (page == size) { print $2; exit } }
        }
    }' /proc/mounts
}

# parse FILE: fills `wanted` ("node KiB" -> count) and `order` (its keys as they came).
declare -A wanted=()
order=()
parse() {
    local file=$1 number=0 line word node_list size count node key
    local -a all
    mapfile -t all < <(nodes)
    [[ -r $file ]] || die "cannot read $file"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%%#*}
        local where="$file, line $number"
        node_list='' size='' count=''
        for word in $line; do
            case $word in
                node=*) node_list=${word#*=} ;;
                size=*) size=${word#*=} ;;
                count=*) count=${word#*=} ;;
                *) die "$where: \"$word\" is not known; a line is node=all|N[,N] size=2M|1G count=COUNT" ;;
            esac
        done
        [[ -n $node_list$size$count ]] || continue
        [[ -n $node_list && -n $size && -n $count ]] || die "$where: needs all of node=, size= and count="
        [[ $size == 2M || $size == 1G ]] || die "$where: size=$size is not allowed; 2M and 1G are"
        [[ $count =~ ^[0-9]{1,9}$ ]] || die "$where: count=$count is no number of pages"
        [[ $node_list == all || $node_list =~ ^[0-9]+(,[0-9]+)*$ ]] || die "$where: node=$node_list is not allowed; all, 0 and 0,1 are"
        local -a chosen
        if [[ $node_list == all ]]; then chosen=("${all[@]}"); else IFS=, read -r -a chosen <<<"$node_list"; fi
        for node in "${chosen[@]}"; do
            node=$((10#$node))
            [[ -d $NODES/node$node ]] || die "$where: this machine has no NUMA node $node; it has: ${all[*]}"
            [[ -d $NODES/node$node/hugepages/hugepages-$(kib_of "$size")kB ]] ||
                die "$where: this CPU or kernel has no $size pages$([[ $size == 1G ]] && ! grep -qw pdpe1gb /proc/cpuinfo && echo " (/proc/cpuinfo lacks pdpe1gb)")"
            key="$node $(kib_of "$size")"
            [[ -n ${wanted[$key]+there} ]] || order+=("$key")
            wanted[$key]=$((10#$count))
        done
    done <"$file"
    ((${#order[@]} > 0)) || die "$file asks for no pages"
}

# reserve NODE KIB COUNT: the node's pages after it, on standard output.
reserve() {
    local file=$NODES/node$1/hugepages/hugepages-${2}kB/nr_hugepages got attempt
    got=$(read_count "$file")
    for ((attempt = 0; attempt < ATTEMPTS && got != $3; attempt++)); do
        # Free memory is often there, but in pieces.
        ((attempt == 0)) || echo 1 >"$NODES/node$1/compact" 2>/dev/null || true
        # Interrupted or partly done: what the kernel has then is read back.
        echo "$3" >"$file" 2>/dev/null || true
        got=$(read_count "$file")
    done
    echo "$got"
}

# Mounts hugetlbfs for pages of that many KiB where it is missing.
mount_pages() {
    local size target
    size=$(size_of "$1")
    [[ -z $(mount_of "$1") ]] || return 0
    target=/dev/hugepages
    if [[ $1 == 1048576 ]] || mountpoint -q "$target"; then target=/dev/hugepages-$size; fi
    mkdir -p "$target"
    mount -t hugetlbfs -o "pagesize=$size" hugetlbfs "$target"
    echo "mounted hugetlbfs with $size pages at $target"
}

# Refuses what would leave a node no memory: the kernel would take it from everything that runs.
fits() {
    local node key wants total
    for node in $(nodes); do
        wants=0
        for key in "${order[@]}"; do
            [[ ${key% *} != "$node" ]] || wants=$((wants + ${wanted[$key]} * ${key#* } / 1024))
        done
        total=$(awk '/MemTotal/ { print int($4 / 1024) }' "$NODES/node$node/meminfo")
        ((wants * 100 <= total * MOST_PERCENT)) ||
            die "$config asks for $wants MiB on node $node, which has $total MiB: ask for less (at most $MOST_PERCENT% of it); nothing has been changed"
    done
}

apply() {
    local key node kib size got free short=0 short_gib=0
    need_root
    parse "$1"
    fits
    # Give back first, so that what one line frees another can have; large pages before small ones.
    for key in "${order[@]}"; do
        read -r node kib <<<"$key"
        (($(read_count "$NODES/node$node/hugepages/hugepages-${kib}kB/nr_hugepages") <= ${wanted[$key]})) || reserve "$node" "$kib" "${wanted[$key]}" >/dev/null
    done
    for kib in 1048576 2048; do
        size=$(size_of "$kib")
        local some=0
        for key in "${order[@]}"; do
            [[ ${key#* } == "$kib" ]] || continue
            node=${key% *}
            got=$(reserve "$node" "$kib" "${wanted[$key]}")
            free=$(read_count "$NODES/node$node/hugepages/hugepages-${kib}kB/free_hugepages")
            printf 'node %s: %s pages of %s asked for, %s there, %s free' "$node" "${wanted[$key]}" "$size" "$got" "$free"
            if ((got < ${wanted[$key]})); then
                printf ' - TOO FEW'
                short=1
                ((kib == 2048)) || short_gib=1
            elif ((got > ${wanted[$key]})); then
                printf ' - the rest is in use and goes when it is freed'
            fi
            printf '\n'
            ((got == 0)) || some=1
        done
        ((some == 0)) || mount_pages "$kib"
    done
    ((short == 0)) || { remedy "$short_gib" >&2; return 1; }
}

# What helps where pages are missing. $1: 1 when pages of 1G are.
remedy() {
    local key node kib arguments='' gib='' mib=''
    for key in "${order[@]}"; do
        read -r node kib <<<"$key"
        ((${wanted[$key]} > 0)) || continue
        if ((kib == 2048)); then mib+=",$node:${wanted[$key]}"; else gib+=",$node:${wanted[$key]}"; fi
    done
    [[ -z $gib ]] || arguments+=" hugepagesz=1G hugepages=${gib#,}"
    [[ -z $mib ]] || arguments+=" hugepagesz=2M hugepages=${mib#,}"
    echo "hugepages.sh: fewer pages than asked for:"
    if (($1)); then
        echo "  - pages of 1G need 1 GiB of memory in one piece, which a machine that has run has seldom; the kernel can"
        echo "    have them at boot: see below"
    fi
    echo "  - free memory: stop what uses it, or 'echo 3 > /proc/sys/vm/drop_caches' (file caches), and run this again"
    echo "  - reserve at boot, by the kernel command line (GRUB_CMDLINE_LINUX in /etc/default/grub, then update-grub):"
    echo "       $arguments"
    (($1)) || echo "    or early at boot, by this script: scripts/hugepages.sh --at-boot"
    echo "  - ask for less in $config, if the node has not that much memory: $(for node in $(nodes); do
        awk -v node="$node" '/MemTotal/ { total = $4 } /MemFree/ { free = $4 }
            END { printf "node %s has %d MiB, %d MiB free; ", node, total / 1024, free / 1024 }' "$NODES/node$node/meminfo"
    done)" | sed 's/; $//'
}

show() {
    local node path kib
    printf '%-5s %-6s %8s %8s %8s\n' node size pages free MiB
    for node in $(nodes); do
        for path in "$NODES/node$node"/hugepages/hugepages-*kB; do
            [[ -d $path ]] || continue
            kib=${path##*hugepages-}
            kib=${kib%kB}
            printf '%-5s %-6s %8s %8s %8s\n' "$node" "$(size_of "$kib")" "$(read_count "$path/nr_hugepages")" \
                "$(read_count "$path/free_hugepages")" $(($(read_count "$path/nr_hugepages") * kib / 1024))
        done
    done
    awk '$3 == "hugetlbfs" { print "hugetlbfs: " $2 " (" $4 ")"; n++ } END { if (!n) print "hugetlbfs: not mounted" }' /proc/mounts
    if [[ -e $UNIT_FILE ]]; then
        echo "at boot: $(sed -n 's/^ExecStart=//p' "$UNIT_FILE")"
    else
        echo "at boot: nothing of Taffrail's"
    fi
}

# A running systemd is told; a system that is being installed has none.
reload_units() { [[ ! -d /run/systemd/system ]] || systemctl daemon-reload; }

at_boot() {
    need_root
    command -v systemctl >/dev/null || die "there is no systemd here; run $script from what starts this machine instead"
    parse "$1"
    [[ $script != *[[:space:]%\"\\]* && $1 != *[[:space:]%\"\\]* ]] || die "systemd needs paths without blanks, %, \" and \\: $script, $1"
    # Before sysinit.target: memory is in larger pieces the earlier it is asked for.
    cat >"$UNIT_FILE.new" <<UNIT
# Written by $script --at-boot; --not-at-boot removes it.
[Unit]
Description=Huge pages for Taffrail
DefaultDependencies=no
Conflicts=shutdown.target
After=local-fs.target dev-hugepages.mount systemd-sysctl.service
Before=sysinit.target shutdown.target
RequiresMountsFor=$script $1

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=$script apply --config $1

[Install]
WantedBy=sysinit.target
UNIT
    mv "$UNIT_FILE.new" "$UNIT_FILE"
    reload_units
    systemctl --quiet enable "$UNIT"
    echo "at boot: $UNIT applies $1 with $script (both must stay where they are)"
}

not_at_boot() {
    need_root
    if [[ ! -e $UNIT_FILE ]]; then
        echo "at boot: there was no $UNIT"
        return
    fi
    systemctl --quiet disable "$UNIT"
    rm -f "$UNIT_FILE"
    reload_units
    echo "at boot: removed $UNIT"
}

config=$PWD/hugepages.conf
action=apply
while (($# > 0)); do
    case $1 in
        apply) action=apply ;;
        --show | show) action=show ;;
        --at-boot) action=at_boot ;;
        --not-at-boot) action=not_at_boot ;;
        --config) [[ -n ${2:-} ]] || usage; config=$2; shift ;;
        *) usage ;;
    esac
    shift
done
[[ $config == /* ]] || config=${OLDPWD:-$PWD}/$config
case $action in
    apply) apply "$config" ;;
    show) show ;;
    at_boot) at_boot "$config"; apply "$config" ;;
    not_at_boot) not_at_boot ;;
esac
