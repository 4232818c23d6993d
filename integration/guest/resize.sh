# The disk grows under load: the new size is there without a reboot, and the last sector works.
same "$(blockdev --getsize64 /dev/vda)" "$before" "size at first"
load_on /dev/vda --bsrange=512-64k
say loading
grown() { [ "$(blockdev --getsize64 /dev/vda)" = "$after" ]; }
wait_for 30 grown
say grown
load_off
last=$((after / 512 - 1))
dd if=/dev/urandom of=/tmp/block bs=512 count=1 2>/dev/null
dd if=/tmp/block of=/dev/vda bs=512 seek=$last count=1 oflag=direct conv=notrunc,fsync 2>/dev/null || fail "cannot write the last sector"
same "$(dd if=/dev/vda bs=512 skip=$last count=1 iflag=direct 2>/dev/null | md5sum)" "$(md5sum </tmp/block)" "the last sector"
run_fio after --filename=/dev/vda --rw=randwrite --bsrange=512-512k --iodepth=16 --offset=64m --size=31m
say block md5=$(md5sum </tmp/block | cut -d' ' -f1)
