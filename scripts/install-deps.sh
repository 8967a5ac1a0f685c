#!/usr/bin/env bash
# install-deps.sh - installs what Taffrail needs on Debian 12: packages and, where there is none that
# is new enough, Rust.
#
# usage: install-deps.sh [--run] [--build] [--test] [--lab]     (no option: all of them)
#
#   --run    to run the server: DPDK with its drivers, hwloc
#   --build  to build it: headers, libclang, a C compiler, Rust
#   --test   for the tests and the demo: network tools, fio, jq, scapy, shellcheck
#   --lab    for the QEMU guest: emulator, kernel and initramfs tools
#
# Can be run again; does nothing where everything is there.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

RUN=(dpdk libhwloc15 iproute2 kmod)
BUILD=(libdpdk-dev libhwloc-dev libudev-dev libclang-14-dev clang-14 pkg-config build-essential ca-certificates curl git)
TEST=(dpdk-dev fio ethtool iputils-ping jq kcat libssl-dev libzstd-dev procps python3 python3-scapy python3-venv shellcheck util-linux e2fsprogs zlib1g-dev)
LAB=(qemu-system-x86 cpio kmod busybox-static e2fsprogs iproute2 iputils-ping jq util-linux)

packages=()
rust=0
(($# > 0)) || set -- --run --build --test --lab
for option in "$@"; do
    case $option in
        --run) packages+=("${RUN[@]}") ;;
        --build) packages+=("${BUILD[@]}"); rust=1 ;;
        --test) packages+=("${TEST[@]}") ;;
        --lab) packages+=("${LAB[@]}") ;;
        *) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
    esac
done

command -v dpkg-query >/dev/null || die "knows Debian's packages only; install by hand: ${packages[*]}"
missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    [[ $status == ii* ]] || missing+=("$package")
done
if ((${#missing[@]} > 0)); then
    need_root
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if ((rust)) && ! find_cargo; then
    say "installing Rust by rustup"
    installer=$(mktemp)
    trap 'rm -f "$installer"' EXIT
    curl --proto '=https' --tlsv1.2 -fsSL https://sh.rustup.rs -o "$installer" ||
        die "no cargo of version $RUST_VERSION or newer is here, and rustup cannot be downloaded: install Rust by hand (https://rustup.rs)"
    sh "$installer" -y --quiet --no-modify-path --profile minimal -c rustfmt -c clippy
    find_cargo || die "rustup ran, and there is still no cargo of version $RUST_VERSION or newer"
fi
echo "install-deps: everything is there"
