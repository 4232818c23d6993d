# Runs from the root file system on the vublk disk.
[ -e /etc/on-disk ] || fail "still in the initramfs"
grep -q ' / ext4 ' /proc/mounts || fail "the root is not the disk: $(grep ' / ' /proc/mounts)"
mount -o remount,rw /
random_file /root/data 8
want=$(md5sum </root/data)
drop_caches
same "$(md5sum </root/data)" "$want" "md5 of a file on the root file system"
say root uefi=$([ -d /sys/firmware/efi ] && echo 1 || echo 0) md5=${want%% *}
sync
mount -o remount,ro /
