#!/usr/bin/env bash
# Fails, with the reason, unless rustc can build for ARCHITECTURE: rust_target.sh aarch64
set -euo pipefail
target=$1-unknown-linux-gnu
present() { compgen -G "$(rustc --print sysroot)/lib/rustlib/$target/lib/libstd-*.rlib" >/dev/null; }
present && exit
command -v rustup >/dev/null && timeout 300 rustup target add "$target" >&2 || true
present || { echo "== no wheel for $1: rustc has no standard library for $target, and rustup cannot add it" >&2; exit 1; }
