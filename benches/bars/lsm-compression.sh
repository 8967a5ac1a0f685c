#!/usr/bin/env bash
# lsm-compression.sh - how much smaller telemetry (benches/lsm/telemetry.rs, JSON of about 200 bytes) is in the store with the
# default settings: bytes of the messages' values ÷ bytes of the record batches on disk. Prints the other codecs and sizes, too.
# Settings: BAR (3), DIR.

cd "$(dirname "$0")/../.." || exit 2
# shellcheck source=benches/bars/lib.sh
. benches/bars/lib.sh
# shellcheck source=benches/bars/lsm-lib.sh
. benches/bars/lsm-lib.sh

for codec in lz4 zstd:-3 zstd:1 zstd:3 zstd:6; do
    for target in 4096 8192 16384 32768 65536 262144; do
        "$LSM_BENCH" compress --codec "$codec" --target "$target"
    done
done
ratio=$(figure value_bytes_ratio compress)
verdict lsm-compression "$(printf %.2f "$ratio")" "${BAR:-3}"
