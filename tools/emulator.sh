#!/usr/bin/env bash
# What runs aarch64 programs on this x86_64 machine, put into FOLDER: emulator.sh FOLDER
# - qemu-aarch64: starts a program
# - python: starts Debian's Python for aarch64, and again where that starts itself, as sys.executable
# The files are Debian's, from the mirror that this machine uses; nothing is installed on it. Fails, with the reason, where they cannot be had.
set -euo pipefail
folder=$(realpath -m "$1")
[ ! -e "$folder/ready" ] || exit 0
say() { echo "== aarch64 is not emulated: $1" >&2; exit 1; }
[ "$(uname -m)" = x86_64 ] || say "this machine is not x86_64"
for tool in apt-get dpkg; do command -v "$tool" >/dev/null || say "no $tool"; done

echo "== fetching qemu-user and an aarch64 Python (about 80 MB)"
rm -rf "$folder"
mkdir -p "$folder"/{root,host,apt/state/lists/partial,apt/cache/archives/partial}
: >"$folder/apt/status"
options=(
  -qq -o APT::Architecture=amd64 -o APT::Architectures::=amd64 -o APT::Architectures::=arm64
  -o "Dir::State=$folder/apt/state" -o "Dir::State::status=$folder/apt/status" -o "Dir::Cache=$folder/apt/cache"
  -o APT::Install-Recommends=false -o Debug::NoLocking=true -o APT::Sandbox::User=root
)
timeout 200 apt-get "${options[@]}" update >&2 || say "apt-get update failed"
timeout 200 apt-get "${options[@]}" --yes --download-only install qemu-user-static:amd64 python3:arm64 >&2 ||
  say "its packages cannot be downloaded"
for package in "$folder"/apt/cache/archives/*_arm64.deb; do dpkg -x "$package" "$folder/root"; done
for package in "$folder"/apt/cache/archives/qemu-user*_amd64.deb; do dpkg -x "$package" "$folder/host"; done
cp "$(find "$folder/host" -name 'qemu-aarch64*' -not -name '*_be*' -path '*/bin/*' | head -n 1)" "$folder/qemu"
rm -rf "$folder/apt" "$folder/host"

printf '#!/bin/sh\nexec "%s" -L "%s" "$@"\n' "$folder/qemu" "$folder/root" >"$folder/qemu-aarch64"
printf '#!/bin/sh\nexec "%s" -L "%s" -0 "$0" "%s/usr/bin/python3" "$@"\n' "$folder/qemu" "$folder/root" "$folder/root" \
  >"$folder/python"
chmod +x "$folder/qemu-aarch64" "$folder/python"
"$folder/python" -c 'import platform; assert platform.machine() == "aarch64"' || say "its Python does not start"
touch "$folder/ready"
