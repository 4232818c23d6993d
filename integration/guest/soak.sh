# Verify after verify until the time is over, each with other depths, sizes and seeds,
# on all disks at once.
end=$(($(now) + seconds * 100))
round=0
written=0
while [ $(now) -lt $end ]; do
    pids=
    k=0
    for disk in $(echo $disks | tr , ' '); do
        case $(((round + k) % 4)) in
        0) set -- --bsrange=512-512k --iodepth=32 ;;
        1) set -- --bsrange=4k-64k --iodepth=8 --numjobs=2 --offset_increment=32m ;;
        2) set -- --bs=4k --iodepth=64 ;;
        3) set -- --bsrange=512-2m --iodepth=4 --iodepth_batch_submit=4 --numjobs=4 --offset_increment=32m ;;
        esac
        (run_fio $disk-r$round --filename=/dev/$disk --rw=randwrite --size=32m --randseed=$round$k "$@") &
        pids="$pids $!"
        k=$((k + 1))
    done
    for pid in $pids; do wait $pid || exit 1; done
    round=$((round + 1))
    rm -f /tmp/fio.*
done
say soaked rounds=$round seconds=$((seconds + ($(now) - end) / 100))
