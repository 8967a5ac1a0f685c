#!/usr/bin/env bash
# kafka-peer.sh - fetches a real Kafka and librdkafka's load generator, below target/kafka-peer, for the bars that
# compare with them.
#
# usage: scripts/kafka-peer.sh
#
# Kafka's jars by Maven (benches/bars/kafka-peer/pom.xml has the version); rdkafka_performance is built from the source
# in the crate rdkafka-sys, with zstd, which SSTs are compressed with. Needs Java 17 or newer, Maven, a C compiler, make,
# zstd's headers and python3. Can be run again; does
# nothing where everything is there.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

peer=$PWD/target/kafka-peer
wanted=$(cat benches/bars/kafka-peer/* | sha256sum)
[[ -f $peer/installed && $(<"$peer/installed") == "$wanted" ]] && exit 0
for tool in java mvn make cc python3; do
    command -v "$tool" >/dev/null || die "needs $tool (apt-get install default-jre-headless maven build-essential python3)"
done
echo '#include <zstd.h>' | cc -E - >/dev/null 2>&1 || die "needs zstd's headers (apt-get install libzstd-dev)"
find_cargo || die "no cargo of version $RUST_VERSION or newer"

rm -rf "$peer"
mkdir -p "$peer"
say "fetching Kafka"
mvn -q -B -f benches/bars/kafka-peer/pom.xml dependency:copy-dependencies -DincludeScope=runtime \
    -DoutputDirectory="$peer/libs"
say "building rdkafka_performance"
mkdir "$peer/crate"
cp benches/bars/kafka-peer/Cargo.toml "$peer/crate/"
source=$(cargo metadata --quiet --format-version 1 --manifest-path "$peer/crate/Cargo.toml" |
    python3 -c '
import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "rdkafka-sys":
        print(os.path.dirname(package["manifest_path"]))')
cp -r "$source/librdkafka" "$peer/librdkafka"
(
    cd "$peer/librdkafka"
    ./configure --disable-ssl --disable-gssapi --disable-sasl --disable-curl --enable-zstd --disable-lz4-ext
    make -C src librdkafka.a
    make -C examples rdkafka_performance
) >"$peer/build.log" 2>&1 || die "librdkafka does not build: see $peer/build.log"
cp "$peer/librdkafka/examples/rdkafka_performance" "$peer/"
rm -rf "$peer/librdkafka" "$peer/crate"
echo "$wanted" >"$peer/installed"
