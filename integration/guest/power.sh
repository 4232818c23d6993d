# A file system that is written to until the power goes. What is durable by now is told: files, and a file that is
# replaced again and again. Beside them are files whose writer never waits for the disk.
disk=/dev/vda
case $kind in
ext4) mkfs.ext4 -q -F -E nodiscard $disk ;;
xfs) modprobe xfs; mkfs.xfs -q -f $disk ;;
btrfs) modprobe btrfs; mkfs.btrfs -q -f $disk ;;
esac
mount -t $kind $disk /mnt || fail "cannot mount $kind"
random_file /tmp/data 2
mkdir /mnt/kept /mnt/noise
sync
say mounted

(
    i=0
    while [ ! -e /tmp/stop ]; do
        dd if=/tmp/data of=/mnt/noise/n$((i % 20)) bs=4001 skip=$((i % 100)) count=$((i % 50 + 1)) 2>/dev/null
        rm -f /mnt/noise/n$(((i + 7) % 20))
        [ $((i % 8)) != 0 ] || sync -f /mnt
        i=$((i + 1))
    done
) &
noise=$!

i=0
while [ $i -lt $files ]; do
    i=$((i + 1))
    dd if=/tmp/data of=/mnt/kept/f$i bs=1237 skip=$i count=$((i % 40 + 1)) conv=fsync 2>/dev/null
    sync /mnt/kept
    say kept name=f$i md5=$(md5sum </mnt/kept/f$i | cut -d' ' -f1)
    if [ $((i % 4)) = 0 ]; then
        yes $i | head -n 2000 >/mnt/new
        sync /mnt/new
        mv /mnt/new /mnt/current
        sync /mnt
        say replaced n=$i
    fi
done
touch /tmp/stop
wait $noise
