# vublkd on this guest's own kernel, which is older than the one that the tests run on.
mkfs.ext4 -q /dev/vda
mkdir -p /mnt
mount -t ext4 /dev/vda /mnt
head -c 67108864 /dev/zero >/mnt/disk.raw
for engine in io_uring threads; do
    vublkd --socket-path=/tmp/disk.sock --blk-file=/mnt/disk.raw --engine=$engine >/tmp/vublkd.log 2>&1 &
    parent=$!
    wait_for 20 test -S /tmp/disk.sock.control
    vublk bench /tmp/disk.sock --rw=randrw --verify --destroy-data --runtime=6 --qd=8 --json >/tmp/result 2>/tmp/complaint &
    load=$!
    wait_for 20 grep -q 'a front-end connected' /tmp/vublkd.log
    usleep 1500000
    read -r daemon </proc/$parent/task/$parent/children || true
    kill -9 $daemon
    wait_for 20 grep -q 'took over from a vublkd that died' /tmp/vublkd.log
    vublk upgrade /tmp/disk.sock
    wait $load || { cat /tmp/complaint /tmp/vublkd.log; fail "$engine: $(tail -n 1 /tmp/complaint)"; }
    if grep -E 'the sandbox (is without|has no)|cannot|ERROR' /tmp/vublkd.log | grep -v 'killed by signal 9'; then fail "$engine: $(tail -n 1 /tmp/vublkd.log)"; fi
    vublk status /tmp/disk.sock >/tmp/status
    same "$(awk '$1 == "counters.errors" {print $2}' /tmp/status)" 0 "errors of $engine"
    say verified requests=$(awk '$1 == "counters.requests" {print $2}' /tmp/status)
    kill $parent
    wait $parent
done
umount /mnt
