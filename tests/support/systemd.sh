# A systemd of one's own: pid 1 of a pid namespace, with these units and no others.
#
#   systemd.sh UNITS CGROUP
#
# It sees one cgroup as its whole tree (CGROUP, which the caller made and removes), a /run of its
# own, and of the machine's files nothing that it would write to. It ends with this process.
set -e
if [ "$3" != inside ]; then
    echo $$ >"$2/cgroup.procs"
    exec unshare --cgroup --pid --fork --kill-child=KILL --mount --mount-proc --ipc --uts sh "$0" "$1" "$2" inside
fi
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
legacy=
[ -d /sys/fs/cgroup/systemd ] && legacy=1
mount -t tmpfs tmpfs /sys/fs/cgroup
if [ $legacy ]; then
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
else
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
export container=other SYSTEMD_UNIT_PATH="$1" SYSTEMD_GENERATOR_PATH=/none
exec /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=0
