#!/bin/bash
# Prepares this machine for `make demo` and the tests: Debian packages, which it installs where they are missing, and in
# .cache a QEMU, a guest kernel and the initramfs layers. The QEMU and the kernel are unpacked there and never installed:
# the host's QEMU, apt's sources and every package that is installed stay as they are.
#
# Safe to run at any time: it prints one line for each thing that it does, and nothing when there is nothing to do. Two at
# once wait for each other.
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
installed() { [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]; }

updated=
apt_update() {
    [ -z "$updated" ] || return 0
    say "reading the package lists"
    as_root apt-get -qq update || die "apt-get update failed"
    updated=1
}

apt_install() {
    local log=$cache/apt.log
    say "installing on this machine: $*"
    # A package list from yesterday may name files the mirror no longer has: one retry with fresh lists.
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" </dev/null >"$log" 2>&1 ||
        { apt_update
          as_root apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" </dev/null >"$log" 2>&1 ||
              { tail -n 15 "$log" >&2; die "could not install $*"; }; }
}

# --- packages ---------------------------------------------------------------
missing=()
for p in gcc g++ libc6-dev python3 valgrind bpftrace util-linux iproute2 ovmf busybox-static fio e2fsprogs xfsprogs btrfs-progs \
         cpio grub-common grub-pc-bin grub-efi-amd64-bin mtools dosfstools man-db mandoc nbdkit nbd-server; do
    installed "$p" || missing+=("$p")
done
[ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"

# The address of the Debian mirror that this machine already uses, and the name of its release.
. /etc/os-release
debian_uri() {
    apt-get indextargets 'Created-By: Packages' 'Origin: Debian' 'Component: main' --format '$(REPO_URI)' \
        "Codename: $VERSION_CODENAME" | head -n1
}
uri=$(debian_uri)
[ -n "$uri" ] || { apt_update; uri=$(debian_uri); }
[ -n "$uri" ] || die "apt has no source of Debian $VERSION_CODENAME (/etc/apt/sources.list)"

# --- QEMU: unpacked only --------------------------------------------------------
# The tests are written for QEMU 10, which Debian 12 has in backports.
want_qemu=10
qemu=$cache/qemu
qemu_programs="qemu-system-x86_64 qemu-storage-daemon qemu-img qemu-nbd"

qemu_works() { # folder
    local program
    for program in $qemu_programs; do
        "$1/bin/$program" --version >/dev/null 2>&1 || return 1
    done
}

# A list of packages of its own for apt, where nothing counts as installed: the packages that QEMU needs can be asked for,
# and neither the sources nor the packages of this machine change.
apt_qemu() {
    apt-get -qq -o Dir::State="$cache/apt/state" -o Dir::State::status=/dev/null -o Dir::Cache="$cache/apt/cache" \
        -o Dir::Etc::sourcelist="$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o APT::Install-Recommends=false -o Acquire::Languages=none "$@"
}

qemu_suite=$VERSION_CODENAME-backports
qemu_lists() {
    local key=/usr/share/keyrings/debian-archive-keyring.gpg
    mkdir -p "$cache"/apt/state/lists/partial "$cache"/apt/cache/archives/partial
    printf "deb [signed-by=$key] %s %s main\n" "$uri" "$VERSION_CODENAME" "$uri" "$qemu_suite" >"$cache/apt/sources.list"
    apt_qemu update >"$cache/apt.log" 2>&1 || { tail -n 5 "$cache/apt.log" >&2; die "cannot read the package lists of $qemu_suite"; }
}

unpack_qemu() {
    local suite=$qemu_suite dir packages=() name version program from=
    qemu_lists
    apt_qemu -s install qemu-system-x86 qemu-utils >"$cache/apt/plan" 2>"$cache/apt.log" ||
        { tail -n 5 "$cache/apt.log" >&2; die "apt finds no QEMU in Debian $VERSION_CODENAME"; }
    version=$(sed -n 's/^Inst qemu-system-x86 ([0-9]*:\([0-9]*\).*/\1/p' "$cache/apt/plan")
    if [ "${version:-0}" -lt $want_qemu ]; then
        # Only these from there: other packages of the backports may not fit libraries that are installed.
        apt_qemu -s install {qemu-system-x86,qemu-system-common,qemu-system-data,qemu-utils,seabios}/"$suite" \
            >"$cache/apt/plan" 2>"$cache/apt.log" ||
            { tail -n 5 "$cache/apt.log" >&2; die "apt finds no QEMU in $suite"; }
    fi
    # A library that is installed is used as it is: beside the installed C library another one would not work.
    while read -r _ name version _; do
        case $name in
        qemu-* | seabios | ipxe-qemu) ;;
        lib*) ! installed "$name" || continue ;;
        *) continue ;;
        esac
        packages+=("$name=${version#(}")
    done < <(grep '^Inst ' "$cache/apt/plan")
    say "unpacking a QEMU for the tests into .cache/qemu (${#packages[@]} packages; nothing is installed)"
    dir=$(mktemp -d "$cache/deb.XXXXXX")
    # apt warns that its sandbox user cannot write here; the files arrive all the same.
    (cd "$dir" && apt_qemu download "${packages[@]}" >"$cache/apt.log" 2>&1) ||
        { tail -n 5 "$cache/apt.log" >&2; rm -rf "$dir"; die "could not download QEMU"; }
    rm -rf "$qemu" "$qemu.new"
    for name in "$dir"/*.deb; do dpkg-deb -x "$name" "$qemu.new"; done
    rm -rf "$dir" "$cache/apt"
    mkdir "$qemu.new/bin"
    for program in $qemu_programs; do
        from=
        case $program in
        qemu-system-*) from='-L "$root/usr/share/seabios" -L "$root/usr/share/qemu" -L "$root/usr/lib/ipxe/qemu" ' ;;
        esac
        cat >"$qemu.new/bin/$program" <<EOF
#!/bin/sh
root=\$(dirname "\$(dirname "\$(readlink -f "\$0")")")
libraries=lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="\$root/usr/\$libraries/qemu"
export LD_LIBRARY_PATH="\$root/usr/\$libraries:\$root/\$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
exec "\$root/usr/bin/$program" $from"\$@"
EOF
        chmod +x "$qemu.new/bin/$program"
    done
    qemu_works "$qemu.new" || { "$qemu.new/bin/qemu-system-x86_64" --version >&2 || true; die "the unpacked QEMU does not run"; }
    mv "$qemu.new" "$qemu"
}
qemu_works "$qemu" || unpack_qemu

# QEMU's own driver of RBD images, which is in a package of its own. It uses the librbd that is installed.
unpack_qemu_rbd() {
    local dir version module=usr/lib/x86_64-linux-gnu/qemu/block-rbd.so
    [ ! -e "$qemu/$module" ] || return 0
    version=$("$qemu/bin/qemu-img" --version | sed -n 's/.*(Debian \(.*\))$/\1/p')
    say "unpacking QEMU's RBD driver $version into .cache/qemu"
    qemu_lists
    dir=$(mktemp -d "$cache/deb.XXXXXX")
    if ! (cd "$dir" && apt_qemu download "qemu-block-extra=$version" >"$cache/apt.log" 2>&1); then
        rm -rf "$dir"
        [ -z "${1:-}" ] || { tail -n 5 "$cache/apt.log" >&2; die "could not download qemu-block-extra $version"; }
        # The driver works only with the QEMU of its own build, and the mirror has a newer one by now.
        unpack_qemu
        unpack_qemu_rbd again
        return
    fi
    dpkg-deb --fsys-tarfile "$dir"/*.deb | tar -C "$dir" -x "./$module"
    mv "$dir/$module" "$qemu/$module"
    rm -rf "$dir" "$cache/apt"
    installed librbd1 || apt_install librbd1
}

# --- `setup.sh remote`: Ceph, for the tests of RBD disks --------------------------
# Its packages bring services, and those of other packages with them. None is started here, and those that would run
# from the next boot on are masked, unless they were on this machine before.
install_ceph() {
    local missing=() p policy=/usr/sbin/policy-rc.d
    for p in ceph-mon ceph-osd ceph-mgr ceph-common; do installed "$p" || missing+=("$p"); done
    [ ${#missing[@]} != 0 ] || return 0
    if [ ! -e "$policy" ]; then
        trap "as_root rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root install -m 0755 /dev/stdin "$policy"
    fi
    installed ceph-base || mask ceph-crash.service
    installed smartmontools || mask smartmontools.service
    apt_install "${missing[@]}"
}
mask() {
    [ -e "/etc/systemd/system/$1" ] || as_root install -d /etc/systemd/system
    [ -e "/etc/systemd/system/$1" ] || as_root ln -s /dev/null "/etc/systemd/system/$1"
}
install_ceph
case ${1:-} in remote | bench) unpack_qemu_rbd ;; esac

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

# --- `setup.sh roots`: root file systems for the cases of libvirt and `host` (libvirt), and for install.py (debian) ------------------
root_of() { # NAME PACKAGES [mmdebstrap's options]
    [ ! -s "$cache/$1.tar" ] || return 0
    installed mmdebstrap || apt_install mmdebstrap
    say "making the root file system $1.tar of a Debian (a few minutes)"
    as_root mmdebstrap --quiet --format=tar --variant=minbase --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --include="$2" "${@:3}" \
        "$VERSION_CODENAME" "$cache/$1.tar.new" "$uri" >"$cache/mmdebstrap.log" 2>&1 ||
        { tail -n 15 "$cache/mmdebstrap.log" >&2; die "could not make the root file system $1.tar"; }
    as_root chown "$(id -u):$(id -g)" "$cache/$1.tar.new"
    mv "$cache/$1.tar.new" "$cache/$1.tar"
}
if [ "${1:-}" = roots ]; then
    root_of libvirt systemd-sysv,dbus,kmod,apparmor,libvirt-daemon-system,libvirt-clients,libvirt-daemon-driver-qemu,qemu-system-x86 \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*'
    root_of debian systemd-sysv,dbus,apparmor
fi

# --- `setup.sh bench`: what draws the figures of BENCHMARKS.md --------------------------
if [ "${1:-}" = bench ]; then installed python3-matplotlib || apt_install python3-matplotlib; fi

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
