#!/usr/bin/env bash
# Fuzzes one target, or all one after the other: scripts/fuzz.sh TARGET|all SECONDS
# Needs a nightly toolchain and cargo-fuzz (cargo install cargo-fuzz). New inputs are kept in
# fuzz/corpus, findings in fuzz/artifacts. Ends with status 1 at the first finding.
set -euo pipefail
cd "$(dirname "$0")/.."

targets=(packet datagram_server datagram_client record_batch segment codec snapshot config)

usage() {
    echo "usage: scripts/fuzz.sh TARGET|all SECONDS   (targets: ${targets[*]})" >&2
    exit 2
}

[[ $# -eq 2 && $2 =~ ^[0-9]+$ ]] || usage
if [[ $1 != all ]]; then
    [[ " ${targets[*]} " == *" $1 "* ]] || usage
    targets=("$1")
fi
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "fuzz.sh: cargo-fuzz or the nightly toolchain is missing; run: rustup toolchain install nightly && cargo install cargo-fuzz" >&2
    exit 2
fi

for target in "${targets[@]}"; do
    echo "== $target, $2 s"
    mkdir -p "fuzz/corpus/$target" "fuzz/seeds/$target"
    nice -n 19 cargo +nightly fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$2" -max_len=8192 -timeout=10 -print_final_stats=1
done
