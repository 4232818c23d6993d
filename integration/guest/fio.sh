# fio on each disk at once, one depth after the other. depths=1,32 size=16m queues=2
for disk in $(echo $disks | tr , ' '); do
    same "$(ls /sys/block/$disk/mq | wc -l)" "$queues" "queues of $disk"
    block=$(blockdev --getss /dev/$disk)
    [ $block -ge 4096 ] && low=4k || low=512
done
for depth in $(echo $depths | tr , ' '); do
    pids=
    for disk in $(echo $disks | tr , ' '); do
        (run_fio $disk-d$depth --filename=/dev/$disk --rw=randwrite --bsrange=$low-512k \
            --iodepth=$depth --size=$size --randseed=$depth$$) &
        pids="$pids $!"
    done
    for pid in $pids; do wait $pid || exit 1; done
done
