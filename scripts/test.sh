#!/usr/bin/env bash
# test.sh - installs what the tests need and runs them all.
#
# usage: sudo scripts/test.sh [--lab] [--only STEP]
#
#   --lab        also the tests in the QEMU guest (software emulation, some minutes)
#   --only STEP  one step: fmt, clippy, docs, tests, no-dpdk, loom, shell or lab
#
# The last line counts: cargo's tests one by one, every other step as one. Exit status 0: all passed.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

lab=0 only=
while (($# > 0)); do
    case $1 in
        --lab) lab=1 ;;
        --only) only=${2:?--only needs a step}; shift ;;
        *) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
    esac
    shift
done
[[ $only == lab ]] && lab=1

need_root
options=(--run --build --test)
((lab)) && options+=(--lab)
scripts/install-deps.sh "${options[@]}"
find_cargo || die "no cargo of version $RUST_VERSION or newer"
export CARGO_TERM_COLOR=never RUST_BACKTRACE=1

passed=0 failed=0
failures=()
log=$(mktemp)
trap 'rm -f "$log"; restore_hugepages' EXIT

# step NAME COMMAND...: counts cargo's test results where the output has them, else the command itself.
step() {
    local name=$1 status=0 counts
    shift
    [[ -z $only || $only == "$name" ]] || return 0
    say "$name: $*"
    "$@" 2>&1 | tee "$log" || status=$?
    counts=$(awk '/^test result:/ { p += $4; f += $6 } /^(ok|not ok) / { if ($1 == "ok") p++; else f++ } END { print p + 0, f + 0 }' "$log")
    local p=${counts% *} f=${counts#* }
    if ((p + f == 0)); then
        if ((status == 0)); then p=1; else f=1; fi
    elif ((status != 0 && f == 0)); then
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
    ((f == 0)) || failures+=("$name")
}

step fmt cargo fmt --all --check
step clippy cargo clippy --workspace --all-targets --quiet -- -D warnings
step docs env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
scripts/kafka-clients.sh
# Memory for the servers that tests start; they take hugepages where they are.
reserve_hugepages 256
step tests cargo test --workspace --no-fail-fast
step no-dpdk cargo test --no-default-features --lib --target-dir target/no-dpdk
step loom env RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test --release --no-default-features --lib --target-dir target/loom loom
step shell bash -c 'shopt -s globstar nullglob; shellcheck -x scripts/*.sh benches/bars/*.sh tests/**/*.sh .ci/run'
if ((lab)); then
    # The guest runs the release binary of this checkout.
    [[ -n $only && $only != lab ]] || cargo build --release --quiet
    step lab tests/lab/run.sh
fi

echo
((${#failures[@]} == 0)) || echo "failed: ${failures[*]}"
echo "$passed passed, $failed failed"
((failed == 0))
