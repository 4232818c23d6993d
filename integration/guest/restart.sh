# The back-end is stopped and started again while this guest is idle; then I/O goes on.
disk=/dev/vda
random_file /tmp/data 4
i=0
while [ $i -lt $rounds ]; do
    dd if=/tmp/data of=$disk bs=64k seek=$((i * 64)) oflag=direct conv=notrunc,fsync 2>/dev/null || fail "write in round $i"
    say idle n=$i
    hear restarted 60
    drop_caches
    same "$(dd if=$disk bs=64k skip=$((i * 64)) count=64 iflag=direct 2>/dev/null | md5sum)" "$(md5sum </tmp/data)" "data after restart $i"
    i=$((i + 1))
done
run_fio after --filename=$disk --rw=randwrite --bsrange=512-512k --iodepth=16 --size=8m
