#!/bin/bash
# Prepares this machine for `make demo` and the guest tests: Debian packages, a
# guest kernel (unpacked, never installed) and the initramfs layers.
#
# Safe to run at any time: it says one line per thing it really does, and nothing
# when there is nothing to do. Two at once wait for each other.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$here")
cache=$repo/.cache
mkdir -p "$cache"

exec 9>"$cache/setup.lock"
flock 9

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

command -v cargo >/dev/null && cargo --version >/dev/null 2>&1 ||
    die "cargo was not found (or does not run). Install Rust (rustup, or your distribution's packages), make sure cargo is in PATH, then run this again."
[ "$(uname -m)" = x86_64 ] || die "the guests are x86-64 ones and so must this machine be (it is $(uname -m))"
[ -r /etc/debian_version ] || die "this script installs packages with apt and knows Debian only; see integration/README.md for the list of what the tests need"

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi
}

export DEBIAN_FRONTEND=noninteractive
# QEMU 10 is what the tests are written for; Debian 12 has it in backports.
want_qemu=10

installed() { [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]; }

qemu_major() {
    # A package that was removed still has a version while its configuration is left.
    installed qemu-system-x86 || return 0
    dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null | sed 's/^[0-9]*://; s/[^0-9].*//'
}

updated=
apt_update() {
    [ -z "$updated" ] || return 0
    say "reading the package lists"
    as_root apt-get -qq update || die "apt-get update failed"
    updated=1
}

apt_install() {
    local log=$cache/apt.log
    say "installing $*"
    # A package list from yesterday may name files the mirror no longer has: one retry with fresh lists.
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" </dev/null >"$log" 2>&1 ||
        { apt_update
          as_root apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" </dev/null >"$log" 2>&1 ||
              { tail -n 15 "$log" >&2; die "could not install $*"; }; }
}

# The backports of this very Debian, from the mirror this machine already uses.
add_backports() {
    . /etc/os-release
    local suite=$VERSION_CODENAME-backports uri
    local targets=(apt-get indextargets 'Created-By: Packages' 'Origin: Debian' 'Component: main' --format '$(REPO_URI)')
    [ -z "$("${targets[@]}" "Codename: $suite")" ] || return 0
    uri=$("${targets[@]}" "Codename: $VERSION_CODENAME" | head -n1)
    if [ -z "$uri" ]; then
        apt_update
        uri=$("${targets[@]}" "Codename: $VERSION_CODENAME" | head -n1)
    fi
    [ -n "$uri" ] || die "apt knows no Debian $VERSION_CODENAME source to derive the backports from"
    say "adding $suite to apt's sources (/etc/apt/sources.list.d/vublk-backports.list)"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main" |
        as_root tee /etc/apt/sources.list.d/vublk-backports.list >/dev/null
    updated=
    apt_update
}

# --- packages ---------------------------------------------------------------
major=$(qemu_major)
if [ "${major:-0}" -lt $want_qemu ] || ! installed qemu-utils; then
    candidate=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: *[0-9]*:\([0-9]*\).*/\1/p')
    if [ "${candidate:-0}" -ge $want_qemu ]; then
        apt_install qemu-system-x86 qemu-utils
    else
        add_backports
        . /etc/os-release
        b=$VERSION_CODENAME-backports
        apt_install {qemu-system-x86,qemu-system-common,qemu-system-data,qemu-utils,seabios}/$b
    fi
fi

missing=()
for p in gcc g++ libc6-dev python3 valgrind util-linux ovmf busybox-static fio e2fsprogs xfsprogs btrfs-progs \
         cpio grub-common grub-pc-bin grub-efi-amd64-bin mtools dosfstools; do
    installed "$p" || missing+=("$p")
done
[ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"

# --- guest kernel: unpacked only ----------------------------------------------
unpack() { # package, folder
    local dir
    dir=$(mktemp -d "$cache/deb.XXXXXX")
    # apt warns that its sandbox user cannot write here; the file arrives all the same.
    (cd "$dir" && apt-get -qq download "$1" >"$cache/apt.log" 2>&1) ||
        { apt_update; (cd "$dir" && apt-get -qq download "$1" >"$cache/apt.log" 2>&1); } ||
        { tail -n 5 "$cache/apt.log" >&2; rm -rf "$dir"; die "could not download $1"; }
    rm -rf "$2" "$2.new"
    dpkg-deb -x "$dir"/*.deb "$2.new"
    mv "$2.new" "$2"
    rm -rf "$dir"
}

if [ ! -x "$cache/prometheus/usr/bin/promtool" ]; then
    # Unpacked: as a package it would run a service.
    say "unpacking prometheus, which scrapes a daemon in the tests"
    unpack prometheus "$cache/prometheus"
fi

if ! ls "$cache"/kernel/boot/vmlinuz-* >/dev/null 2>&1; then
    image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\).*/\1/p' | head -n1)
    [ -n "$image" ] || { apt_update; image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\).*/\1/p' | head -n1); }
    [ -n "$image" ] || die "apt knows no linux-image-cloud-amd64"
    say "unpacking the guest kernel $image"
    unpack "$image" "$cache/kernel"
fi

# --- `setup.sh host`: a Debian with libvirt, for the case `host` ---------------
if [ "${1:-}" = host ] && [ ! -s "$cache/host.tar" ]; then
    installed mmdebstrap || apt_install mmdebstrap
    say "making the root file system of a host with libvirt (a few minutes)"
    . /etc/os-release
    uri=$(apt-get indextargets 'Created-By: Packages' 'Origin: Debian' 'Component: main' --format '$(REPO_URI)' \
        "Codename: $VERSION_CODENAME" | head -n1)
    as_root mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --include=systemd-sysv,dbus,kmod,libvirt-daemon-system,libvirt-clients,libvirt-daemon-driver-qemu,qemu-system-x86 \
        "$VERSION_CODENAME" "$cache/host.tar.new" "$uri" >"$cache/mmdebstrap.log" 2>&1 ||
        { tail -n 15 "$cache/mmdebstrap.log" >&2; die "could not make the root file system of a host"; }
    as_root chown "$(id -u):$(id -g)" "$cache/host.tar.new"
    mv "$cache/host.tar.new" "$cache/host.tar"
fi

# --- initramfs layers ---------------------------------------------------------
stamp=$({ cat "$here/vtest/initramfs.py" "$here/kexec.c"
          ls "$cache"/kernel/boot/vmlinuz-*
          dpkg-query -W -f '${Package} ${Version}\n' busybox-static fio e2fsprogs xfsprogs btrfs-progs util-linux libc6
        } | sha256sum)
if [ "$(cat "$cache/initramfs.stamp" 2>/dev/null)" != "$stamp" ] || [ ! -s "$cache/base.cpio" ] || [ ! -s "$cache/fio.cpio" ]; then
    say "building the initramfs"
    gcc -O -Wall -static -o "$cache/kexec-load" "$here/kexec.c"
    python3 "$here/vtest/initramfs.py" "$cache"
    echo "$stamp" >"$cache/initramfs.stamp"
fi
