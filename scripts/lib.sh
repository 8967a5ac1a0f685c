#!/usr/bin/env bash
# What the scripts share. Source it; it changes nothing by itself.

# Oldest Rust that builds Taffrail (rust-version in Cargo.toml).
RUST_VERSION=1.89

die() { echo "$(basename "$0"): $*" >&2; exit 1; }
say() { printf '\n== %s\n' "$*"; }

need_root() {
    ((EUID == 0)) || die "needs root: run it with sudo"
}

# Whether version $1 is at least $2.
version_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# Puts a cargo that is new enough into PATH; sudo resets PATH, so the usual places are looked at,
# those of the user behind sudo included. Fails where there is none.
find_cargo() {
    local home dir version
    home=$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)
    for dir in '' "$HOME/.cargo/bin" "$home/.cargo/bin" /root/.cargo/bin /usr/local/cargo/bin; do
        [[ -z $dir || -x $dir/cargo ]] || continue
        version=$(PATH=${dir:+$dir:}$PATH cargo --version 2>/dev/null | awk '{ print $2 }') || continue
        if [[ -n $version ]] && version_at_least "$version" "$RUST_VERSION"; then
            [[ -z $dir ]] || PATH=$dir:$PATH
            # A toolchain of the user behind sudo keeps its files in that user's home.
            if [[ $dir == "$home/.cargo/bin" && $HOME != "$home" && -d $home/.rustup ]]; then
                export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
            fi
            export PATH
            return 0
        fi
    done
    return 1
}

# reserve_hugepages MIB: makes at least that much memory free in 2 MiB pages and mounts hugetlbfs;
# restore_hugepages gives back what it added.
HUGEPAGES_BEFORE=
reserve_hugepages() {
    local free total attempt
    for attempt in 1 2 3 4; do
        free=$(awk '/^HugePages_Free/ { print $2 * 2 }' /proc/meminfo)
        ((free < $1)) || break
        # Free memory is often there, but in pieces.
        ((attempt == 1)) || echo 1 >/proc/sys/vm/compact_memory
        total=$(</proc/sys/vm/nr_hugepages)
        HUGEPAGES_BEFORE=${HUGEPAGES_BEFORE:-$total}
        echo $((total + ($1 - free + 1) / 2)) >/proc/sys/vm/nr_hugepages
    done
    if ! awk '$3 == "hugetlbfs"' /proc/mounts | grep -q .; then
        mkdir -p /dev/hugepages
        mount -t hugetlbfs hugetlbfs /dev/hugepages
    fi
    free=$(awk '/^HugePages_Free/ { print $2 * 2 }' /proc/meminfo)
    ((free >= $1)) || die "$1 MiB of hugepages are needed, the kernel gives $free: free memory, or reserve them at boot (scripts/hugepages.sh --at-boot)"
}
restore_hugepages() {
    [[ -z $HUGEPAGES_BEFORE ]] || echo "$HUGEPAGES_BEFORE" >/proc/sys/vm/nr_hugepages
    HUGEPAGES_BEFORE=
}

# join_by_veth PRODUCER BOX: makes two network namespaces with an eth0 each, joined: a host with the address 10.77.0.1, and one
# whose kernel does nothing on it, for the server.
join_by_veth() {
    ip netns add "$1"
    ip netns add "$2"
    ip -n "$1" link add eth0 type veth peer name eth0 netns "$2"
    ip netns exec "$2" sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1
    ip -n "$1" addr add 10.77.0.1/24 dev eth0
    ip -n "$1" link set lo up
    ip -n "$1" link set eth0 up
    ip -n "$2" link set eth0 up
}
