#!/usr/bin/env bash
# test.sh - installs what the tests need and runs them all.
#
# usage: sudo scripts/test.sh [--lab] [--only STEP]
#
#   --lab        also the tests in the QEMU guest (software emulation, some minutes)
#   --only STEP  one step: fmt, shell, clippy, docs, no-dpdk, loom, tests or lab
#
# The last line counts: cargo's tests one by one, every other step as one; above it are the seconds that each step took.
# Exit status 0: all passed.

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
failures=() mark=
work=$(mktemp -d)
# Process groups of what runs beside the steps, by name.
declare -A beside=()
cleanup() {
    local group
    for group in "${beside[@]}"; do kill -- "-$group" 2>/dev/null || true; done
    restore_hugepages
    rm -rf "$work"
}
trap cleanup EXIT

# mark: the seconds so far in $mark, of the clock and of CPUs; the latter of what this shell has started and waited for.
mark() {
    local file=$work/.times.$BASHPID
    times >"$file"
    mark="$SECONDS $(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += t[1] * 60 + t[2] } printf "%d", s }' "$file")"
}
# took NAME MARK: notes what it took since then.
took() {
    mark
    printf '%-10s %7d %7d\n' "$1" $((${mark% *} - ${2% *})) $((${mark#* } - ${2#* })) >>"$work/.seconds"
}

wanted() { [[ -z $only || $only == "$1" ]]; }

# count NAME STATUS: counts cargo's test results where the output has them, else the step itself.
count() {
    local name=$1 status=$2 counts
    counts=$(awk '/^test result:/ { p += $4; f += $6 } /^(ok|not ok) / { if ($1 == "ok") p++; else f++ } END { print p + 0, f + 0 }' "$work/$name")
    local p=${counts% *} f=${counts#* }
    if ((p + f == 0)); then
        if ((status == 0)); then p=1; else f=1; fi
    elif ((status != 0 && f == 0)); then
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
    ((f == 0)) || failures+=("$name")
}

# step NAME COMMAND...: runs and counts it, if it is wanted.
step() {
    local name=$1 status=0 begin
    shift
    wanted "$name" || return 0
    say "$name: $*"
    mark
    begin=$mark
    "$@" 2>&1 | tee "$work/$name" || status=$?
    took "$name" "$begin"
    count "$name" "$status"
}

# start NAME COMMAND...: runs it beside what follows. `finish NAME` waits for it, shows what it said and returns its status.
start() {
    local name=$1
    shift
    say "$name: $* (beside the next steps)"
    # A process group of its own, which ends as a whole.
    set -m
    {
        status=0
        mark
        begin=$mark
        "$@" || status=$?
        took "$name" "$begin"
        exit "$status"
    } >"$work/$name" 2>&1 </dev/null &
    set +m
    beside[$name]=$!
}
finish() {
    local name=$1 status=0
    wait "${beside[$name]}" || status=$?
    unset "beside[$name]"
    say "$name"
    cat "$work/$name"
    return "$status"
}

# The tests and the binary, once.
built=0
build() {
    local begin
    ((built == 0)) || return 0
    built=1
    mark
    begin=$mark
    say "build: cargo test --workspace --no-run"
    cargo test --workspace --no-run --quiet
    took build "$begin"
}

step fmt cargo fmt --all --check
step shell bash -c 'shopt -s globstar nullglob; shellcheck -x scripts/*.sh benches/bars/*.sh tests/**/*.sh .ci/run'
! wanted tests || start clients scripts/kafka-clients.sh
if ((lab)); then
    # The guest runs this checkout's binary; the emulator takes about one CPU, and compilers wait for it.
    build
    start lab nice -n -5 tests/lab/run.sh
fi
step clippy cargo clippy --workspace --all-targets --quiet -- -D warnings
step docs env RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet
# As a workspace, which is what the other steps build: then what the crate depends on is the same and there already.
step no-dpdk cargo clippy --workspace --no-default-features --lib --bins --quiet -- -D warnings
# The models need seconds; the compiler's optimisations would take longer.
step loom env RUSTC_WORKSPACE_WRAPPER="$PWD/scripts/loom-rustc.sh" LOOM_MAX_PREEMPTIONS=3 \
    cargo test --workspace --no-default-features --lib loom
if wanted tests; then
    build
    finish clients || die "the Kafka clients for the tests could not be installed"
    # Memory for the servers that tests start; they take hugepages where they are.
    reserve_hugepages 256
fi
if ((lab)); then
    status=0
    finish lab || status=$?
    count lab "$status"
fi
step tests cargo test --workspace --no-fail-fast

say "seconds of each step, some of them side by side"
printf '%-10s %7s %7s\n' step clock CPUs
cat "$work/.seconds"
echo
((${#failures[@]} == 0)) || echo "failed: ${failures[*]}"
echo "$passed passed, $failed failed"
((failed == 0))
