# A systemd of one's own: pid 1 of a pid namespace, with these units and no others.
#
#   systemd.sh ROOT CGROUP...
#
# It has ROOT/etc, ROOT/lib and ROOT/bin for its /etc, /var/lib and /run/bin, a /run and /tmp of its own, a cgroup for its
# whole tree in each hierarchy (CGROUP, which the caller made and removes), and of the machine's files nothing that it would write to. It ends
# with this process.
set -e
if [ "$2" != inside ]; then
    root=$1
    shift
    for cgroup; do echo $$ >"$cgroup/cgroup.procs"; done
    exec unshare --cgroup --pid --fork --kill-child=KILL --mount --mount-proc --ipc --uts sh "$0" "$root" inside
fi
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/bin
mount --bind "$1/bin" /run/bin
mount --bind "$1/etc" /etc
mount --bind "$1/lib" /var/lib
legacy=
[ -d /sys/fs/cgroup/systemd ] && legacy=1
mount -t tmpfs tmpfs /sys/fs/cgroup
if [ $legacy ]; then
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
else
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
# Last: ROOT may be there.
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /var/tmp
export container=other SYSTEMD_UNIT_PATH=/etc/systemd/system SYSTEMD_GENERATOR_PATH=/none
exec /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=0
