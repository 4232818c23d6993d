#!/bin/sh
# A root file system of a Debian with its systemd as pid 1, in namespaces of its own, without a network.
#
#   root.sh ROOT CGROUP [SHARED]
#
# The folder SHARED is /srv/vms there.
# One cgroup (CGROUP, which the caller made and removes) is its whole tree, and it may write to nothing of this machine but
# to ROOT and SHARED. It ends with this process.
set -e
if [ "$1" != inside ]; then
    echo $$ >"$2/cgroup.procs"
    exec unshare --cgroup --pid --fork --kill-child=KILL --mount --ipc --uts --net sh "$0" inside "$1" "$3"
fi
root=$2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
if [ "$3" ]; then
    mkdir -p "$root/srv/vms"
    mount --bind "$3" "$root/srv/vms"
fi
mount --bind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
# As a host that was booted by itself: vublkd knows by it whose operations it has to wait for.
cat /proc/sys/kernel/random/uuid >"$root/run/boot_id"
mount --bind "$root/run/boot_id" "$root/proc/sys/kernel/random/boot_id"
legacy=
[ -d /sys/fs/cgroup/systemd ] && legacy=1
mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
if [ $legacy ]; then
    mkdir "$root/sys/fs/cgroup/systemd"
    mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
else
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
fi
mount -t tmpfs tmpfs "$root/dev"
for device in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 0666 "$root/dev/${device%:*}" c 1 "${device#*:}"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
# PrivateDevices= needs it.
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
cd "$root"
mkdir -p mnt/old
pivot_root . mnt/old
umount -l /mnt/old
rmdir /mnt/old
export container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=0
