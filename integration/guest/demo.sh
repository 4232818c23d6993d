# The demonstration: file system, write, flush, drop caches, read back, compare.
disk=/dev/vda
say disk bytes=$(blockdev --getsize64 $disk) block=$(blockdev --getss $disk) \
    queues=$(ls /sys/block/vda/mq | wc -l) cache=$(tr ' ' _ </sys/block/vda/queue/write_cache) kernel=$(uname -r)
mkfs.ext4 -q -F $disk
mount $disk /mnt
# The data is prepared in memory, so that the time measured is the disk's. Each file is the
# same data turned by another number of blocks: no block can stand in for another.
random_file /tmp/data $mib
t=0
n=1
while [ $n -le $copies ]; do
    { tail -c +$((n * 512 + 1)) /tmp/data; head -c $((n * 512)) /tmp/data; } >/tmp/turned
    md5sum </tmp/turned | cut -d' ' -f1 >/tmp/want$n
    before=$(now)
    dd if=/tmp/turned of=/mnt/data$n bs=1M oflag=direct conv=fsync 2>/dev/null
    t=$((t + $(now) - before))
    n=$((n + 1))
done
say written mib=$((mib * copies)) cs=$t

drop_caches
t=$(now)
n=1
while [ $n -le $copies ]; do
    dd if=/mnt/data$n of=/dev/null bs=1M iflag=direct 2>/dev/null
    n=$((n + 1))
done
t=$(($(now) - t))
say read mib=$((mib * copies)) cs=$t

drop_caches
n=1
while [ $n -le $copies ]; do
    same "$(md5sum </mnt/data$n | cut -d' ' -f1)" "$(cat /tmp/want$n)" "md5 of data$n"
    n=$((n + 1))
done
say verified files=$copies md5=$(cat /tmp/want* | tr '\n' ',')
umount /mnt
e2fsck -fn $disk >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "e2fsck found errors"; }
say fsck clean
