#!/usr/bin/env bash
# peer.sh - the host at the other end of the guest's cables: runs what tests/lab/guest.sh asks for.
#
# scripts/lab.sh starts it (LAB_PEER) in the network namespace with the taps, from the checkout's root. A request is
# a file NAME.cmd in $SHARE/peer; its output goes to NAME.out, then its exit status to NAME.rc. Ends with the guest.

set -u
# Longest time of one request, in seconds.
LIMIT=240

mkdir -p "$SHARE/peer"
cd "$SHARE/peer" || exit 1
shopt -s nullglob
while :; do
    for request in *.cmd; do
        name=${request%.cmd}
        command=$(<"$request")
        rm "$request"
        echo "$(date +%T) $command"
        (cd "$OLDPWD" && timeout "$LIMIT" bash -c "$command") >"$name.out" 2>&1 </dev/null
        echo $? >"$name.new"
        mv "$name.new" "$name.rc"
    done
    sleep 0.1
done
