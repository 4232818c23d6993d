# Boots as often as the disk says it has been started: writes in the first life, then checks
# what the life before wrote. how=reboot resets the machine, how=kexec starts a kernel over this one.
disk=/dev/vda
mkdir -p /mnt
mount $disk /mnt || fail "cannot mount"
life=$(cat /mnt/life)
say life n=$life
if [ $life -gt 1 ]; then
    (cd /mnt && md5sum -c sums >/tmp/check 2>&1) || fail "life $life: $(grep -v ': OK' /tmp/check | head -n 1)"
fi
if [ $life -ge $lives ]; then
    umount /mnt
    e2fsck -fn $disk >/tmp/fsck 2>&1 || fail "e2fsck: $(tail -n 2 /tmp/fsck | tr '\n' ' ')"
else
    random_file /mnt/data$life 8
    (cd /mnt && md5sum data* >sums)
    echo $((life + 1)) >/mnt/life
    if [ $how = kexec ]; then
        kexec-load /mnt/vmlinuz /mnt/initrd "$(cat /proc/cmdline)" || fail "cannot load the next kernel"
    fi
    sync
    mount -o remount,ro /mnt
    # Reads are still in flight when the machine goes away.
    (while :; do dd if=$disk of=/dev/null bs=256k count=64 iflag=direct 2>/dev/null; done) &
    usleep 300000
    if [ $how = kexec ]; then kexec-load; else reboot -f; fi
    sleep 1000
fi
