# The disk comes with known contents and must stay as it is.
disk=/dev/vda
same "$(blockdev --getro $disk)" 1 "the read-only flag"
same "$(md5sum <$disk | cut -d' ' -f1)" "$md5" "md5 of the disk"
if dd if=/dev/zero of=$disk bs=4096 count=1 oflag=direct 2>/dev/null; then fail "a write was accepted"; fi
# Clearing the guest's own flag lets the write through to the device, which must refuse it.
blockdev --setrw $disk 2>/dev/null || true
if dd if=/dev/zero of=$disk bs=4096 count=1 oflag=direct 2>/dev/null; then fail "the device accepted a write"; fi
drop_caches
same "$(md5sum <$disk | cut -d' ' -f1)" "$md5" "md5 of the disk after the writes"
