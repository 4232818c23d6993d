# The disk comes full of 0x5a. Ranges in MiB: 8+8 discarded, 24+8 zeroed (may not unmap),
# 40+8 zeroed (may unmap), and one discard that is not aligned to 4096.
disk=/dev/vda
q=/sys/block/vda/queue
[ "$(cat $q/discard_max_bytes)" -gt 0 ] || fail "the disk offers no discard"
[ "$(cat $q/write_zeroes_max_bytes)" -gt 0 ] || fail "the disk offers no write zeroes"
say limits discard=$(cat $q/discard_max_bytes) granularity=$(cat $q/discard_granularity) zeroes=$(cat $q/write_zeroes_max_bytes)
/sbin/blkdiscard -o 8M -l 8M $disk
/sbin/blkdiscard -z -o 24M -l 8M $disk
/sbin/fallocate -p -o 40M -l 8M $disk
/sbin/blkdiscard -o $((56 * 1048576 + 512)) -l 65536 $disk
sync
drop_caches

bytes() { # MiB count byte: how many bytes of the range are that byte
    dd if=$disk bs=1M skip=$1 count=$2 iflag=direct 2>/dev/null | tr -dc "$3" | wc -c
}
# A discard promises no contents, but neighbours must be whole; zeroes must be zeroes.
same "$(bytes 24 8 '\0')" 8388608 "zeroes where they were written without unmap"
same "$(bytes 40 8 '\0')" 8388608 "zeroes where they were written with unmap"
for start in 0 16 32 48; do
    same "$(bytes $start 8 Z)" 8388608 "untouched bytes at $start MiB"
done
# New data in what was discarded.
dd if=/dev/urandom of=/tmp/new bs=64k count=2 2>/dev/null
dd if=/tmp/new of=$disk bs=64k seek=192 oflag=direct conv=notrunc,fsync 2>/dev/null
same "$(dd if=$disk bs=64k skip=192 count=2 iflag=direct 2>/dev/null | md5sum)" "$(md5sum </tmp/new)" "data in a discarded range"
