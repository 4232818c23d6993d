# 4k random reads of each disk in turn. disks=vda,vdb depths=1,32 rounds=3 seconds=3
# Each fixed part of the load is fio's default seed.
for round in $(seq $rounds); do
    for depth in $(echo $depths | tr , ' '); do
        for disk in $(echo $disks | tr , ' '); do
            say ready
            hear go
            fio --name=load --filename=/dev/$disk --ioengine=libaio --direct=1 --rw=randread --bs=4k --iodepth=$depth \
                --time_based --runtime=$seconds --norandommap --minimal >/tmp/fio.load 2>&1 || fail "fio on $disk failed"
            # Fields 5, 8 and 40 of the terse line: the error code, the I/O a second, the mean latency in us.
            line=$(grep -m1 '^3;' /tmp/fio.load) || fail "fio gave no result"
            same "$(echo "$line" | cut -d';' -f5)" 0 "error code of fio"
            say ran round=$round depth=$depth disk=$disk iops=$(echo "$line" | cut -d';' -f8) mean_us=$(echo "$line" | cut -d';' -f40)
            hear noted
        done
    done
done
