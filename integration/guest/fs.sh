# A file system of the given kind: made, loaded, checked, mounted again, checked again.
disk=/dev/vda
case $kind in
ext4) mkfs.ext4 -q -F -E nodiscard $disk ;;
xfs) modprobe xfs; mkfs.xfs -q -f $disk ;;
btrfs) modprobe btrfs; mkfs.btrfs -q -f $disk ;;
esac
mount -t $kind -o discard $disk /mnt || fail "cannot mount $kind"

# Many small files, written by two processes at once.
random_file /tmp/data 8
for p in 1 2; do
    (
        mkdir -p /mnt/small$p
        i=0
        while [ $i -lt 60 ]; do
            dd if=/tmp/data of=/mnt/small$p/f$i bs=4001 skip=$i count=$((i % 9 + 1)) 2>/dev/null
            [ $((i % 10)) != 0 ] || sync -f /mnt
            i=$((i + 1))
        done
    ) &
done
# Large ones, one of them direct, one with holes punched.
cp /tmp/data /mnt/large
dd if=/tmp/data of=/mnt/direct bs=256k oflag=direct conv=fsync 2>/dev/null
cp /tmp/data /mnt/holed
sync -f /mnt
/sbin/fallocate -p -o 1048576 -l 2097152 /mnt/holed
wait
# Overwrites in the middle, a rename, a removal.
dd if=/tmp/data of=/mnt/large bs=4096 seek=100 count=300 conv=notrunc 2>/dev/null
mv /mnt/small1 /mnt/moved
rm -r /mnt/small2
cp -r /mnt/moved /mnt/small2
fstrim -v /mnt >/tmp/trim || fail "fstrim: $(cat /tmp/trim)"

same "$(md5sum </mnt/direct)" "$(md5sum </tmp/data)" "md5 of the directly written file"
same "$(dd if=/mnt/holed bs=1M skip=1 count=2 2>/dev/null | tr -d '\0' | wc -c)" 0 "bytes in a punched hole"
(cd /mnt && find . -type f | sort | xargs md5sum) >/tmp/sums
say written files=$(wc -l </tmp/sums)

check() {
    drop_caches
    (cd /mnt && md5sum -c /tmp/sums >/tmp/check 2>&1) || fail "$kind $1: $(grep -v ': OK' /tmp/check | head -n 3 | tr '\n' ' ')"
}
check "after dropping the caches"
if [ $kind = btrfs ]; then
    btrfs scrub start -B /mnt >/tmp/scrub 2>&1 || fail "scrub: $(tail -n 3 /tmp/scrub | tr '\n' ' ')"
    grep -q 'no errors found' /tmp/scrub || fail "scrub: $(tail -n 3 /tmp/scrub | tr '\n' ' ')"
fi
umount /mnt
case $kind in
ext4) e2fsck -fn $disk ;;
xfs) xfs_repair -n $disk ;;
btrfs) btrfs check $disk ;;
esac >/tmp/fsck 2>&1 || fail "check of $kind: $(tail -n 2 /tmp/fsck | tr '\n' ' ')"
mount -t $kind $disk /mnt
check "after mounting again"
umount /mnt
say checked kind=$kind
