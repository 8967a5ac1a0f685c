#!/usr/bin/env bash
# kafka-clients.sh - installs the Kafka clients that the tests run, below target/kafka-clients.
#
# usage: scripts/kafka-clients.sh
#
# Python's clients by pip into a venv of their own, Node's by npm where there is a node; the versions are pinned
# in tests/kafka/. Can be run again; does nothing where they are there.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

clients=target/kafka-clients
wanted=$(cat tests/kafka/requirements.txt tests/kafka/package.json | sha256sum)
[[ -f $clients/installed && $(<"$clients/installed") == "$wanted" ]] && exit 0

say "installing Kafka clients for the tests"
[[ -x $clients/bin/pip ]] || /usr/bin/python3 -m venv "$clients"
"$clients/bin/pip" install --quiet --disable-pip-version-check -r tests/kafka/requirements.txt
if command -v npm >/dev/null; then
    cp tests/kafka/package.json "$clients/package.json"
    npm install --prefix "$clients" --silent --no-fund --no-audit >/dev/null
fi
echo "$wanted" >"$clients/installed"
