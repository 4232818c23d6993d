# What the guest sees of the device, and the write-cache switch.
b=/sys/block/vda
same "$(blockdev --getsize64 /dev/vda)" "$bytes" "size in bytes"
same "$(blockdev --getss /dev/vda)" "$block" "logical block size"
[ -z "$serial" ] || same "$(cat $b/serial)" "$serial" "serial"
same "$(cat $b/cache_type | tr ' ' -)" "$cache" "cache type"
say facts segments=$(cat $b/queue/max_segments) max_kib=$(cat $b/queue/max_sectors_kb) \
    physical=$(cat $b/queue/physical_block_size) optimal=$(cat $b/queue/optimal_io_size) features=$(cat $b/device/features)
for mode in "write through" "write back" "write through"; do
    echo "$mode" >$b/cache_type
    same "$(cat $b/cache_type)" "$mode" "cache type after a switch"
    dd if=/dev/urandom of=/dev/vda bs=64k count=8 oflag=direct conv=fsync 2>/dev/null
done
# The last block, and nothing after it.
last=$((bytes / block - 1))
dd if=/dev/urandom of=/tmp/block bs=$block count=1 2>/dev/null
dd if=/tmp/block of=/dev/vda bs=$block seek=$last count=1 oflag=direct conv=notrunc 2>/dev/null || fail "cannot write the last block"
same "$(dd if=/dev/vda bs=$block skip=$last count=1 iflag=direct 2>/dev/null | md5sum)" "$(md5sum </tmp/block)" "the last block"
