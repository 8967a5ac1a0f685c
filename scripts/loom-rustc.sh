#!/bin/sh
# loom-rustc.sh - rustc with cfg(loom), as cargo's RUSTC_WORKSPACE_WRAPPER: for this crate alone, so that what it depends on
# is not built again.
exec "$@" --cfg loom
