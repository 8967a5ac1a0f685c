#!/usr/bin/env bash
# kafka-clients.sh - installs the Kafka clients that the tests run, below target/kafka-clients.
#
# usage: scripts/kafka-clients.sh
#
# Python's clients by pip into a venv of their own, and the crate rdkafka, with librdkafka from its own sources. Where their
# languages are there: kafkajs and @confluentinc/kafka-javascript by npm (the latter made from its sources where its
# binary cannot be had), franz-go (Go 1.24 or newer), Kafka's own Java clients (JDK 17 or newer and Maven); what is left out is
# said. The versions are pinned in tests/kafka/. Can be run again; does nothing where they are there.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

clients=$PWD/target/kafka-clients
have() { command -v "$1" >/dev/null; }
find_cargo || die "no cargo of version $RUST_VERSION or newer"
languages="python rust"
have npm && languages+=" node"
# The Go that a Debian has may be older.
if have go && go version | grep -qE 'go1\.(2[4-9]|[3-9][0-9])'; then languages+=" go"; fi
if have javac && have mvn; then languages+=" java"; fi
wanted=$({
    echo "$languages"
    cat tests/kafka/requirements.txt tests/kafka/package.json tests/kafka/franz/* tests/kafka/java/*
    cat tests/kafka/rust/Cargo.* tests/kafka/rust/src/*
} | sha256sum)
[[ -f $clients/installed && $(<"$clients/installed") == "$wanted" ]] && exit 0

# What is compiled here runs for seconds.
export CFLAGS="-O0 -g0" CXXFLAGS="-O0 -g0"
say "installing Kafka clients for the tests ($languages)"
rm -rf "$clients/franz" "$clients/java"
[[ -x $clients/bin/pip ]] || /usr/bin/python3 -m venv "$clients"
"$clients/bin/pip" install --quiet --disable-pip-version-check -r tests/kafka/requirements.txt
cargo build --quiet --locked --manifest-path tests/kafka/rust/Cargo.toml --target-dir "$clients/rust"
if [[ $languages == *node* ]]; then
    cp tests/kafka/package.json "$clients/package.json"
    # Headers that came with node; they are downloaded where it has none.
    prefix=$(dirname "$(dirname "$(readlink -f "$(command -v node)")")")
    [[ ! -d $prefix/include/node ]] || export npm_config_nodedir=$prefix
    # librdkafka against Debian's libraries instead of downloads of their sources.
    CKJS_LINKING=dynamic npm install --prefix "$clients" --silent --no-fund --no-audit >/dev/null
    [[ -d $clients/node_modules/@confluentinc ]] || say "@confluentinc/kafka-javascript could not be made: left out"
fi
if [[ $languages == *go* ]]; then
    (cd tests/kafka/franz && go build -o "$clients/franz" .)
fi
if [[ $languages == *java* ]]; then
    mvn -q -B -f tests/kafka/java/pom.xml dependency:copy-dependencies -DincludeScope=runtime \
        -DoutputDirectory="$clients/java" >/dev/null
    javac -d "$clients/java" -cp "$clients/java/*" tests/kafka/java/Cases.java
fi
echo "$wanted" >"$clients/installed"
