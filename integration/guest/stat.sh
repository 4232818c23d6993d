# The kernel's counts of the disk before and after a load. The host compares them with the daemon's.
tell_counts() { # word
    word=$1
    set -- $(cat /sys/block/vda/stat)
    say $word reads=$1 read_sectors=$3 writes=$5 written_sectors=$7 discards=${12} discarded_sectors=${14} flushes=${16}
}
tell_counts before
hear counted
run_fio mixed --filename=/dev/vda --rw=randrw --bsrange=512-64k --iodepth=16 --size=16m
run_fio synced --filename=/dev/vda --rw=randwrite --bs=4k --iodepth=4 --size=2m --offset=32m --fsync=8
/sbin/blkdiscard -o 40M -l 8M /dev/vda
/sbin/blkdiscard -o $((56 * 1048576 + 512)) -l 65536 /dev/vda
/sbin/blkdiscard -z -o 48M -l 4M /dev/vda
dd if=/dev/urandom of=/dev/vda bs=64k count=16 seek=800 conv=fsync,notrunc 2>/dev/null || fail "cannot write"
drop_caches
dd if=/dev/vda of=/dev/null bs=1M count=24 2>/dev/null || fail "cannot read"
tell_counts after
hear counted
