# Writes to a file system until the power button is pressed, and unmounts it then.
modprobe evdev
modprobe button
mkdir -p /etc/acpi/PWRF /mnt
printf '#!/bin/sh\ntouch /tmp/button\n' >/etc/acpi/PWRF/00000080
chmod 755 /etc/acpi/PWRF/00000080
acpid -f -l /dev/null &
mount -t ext4 /dev/vda /mnt
n=0
while [ ! -e /tmp/button ]; do
    n=$((n + 1))
    echo $n >/mnt/count
    dd if=/bin/busybox of=/mnt/file$((n % 8)) bs=64k count=1 conv=fsync 2>/dev/null
    say wrote n=$n
done
umount /mnt
say unmounted n=$n
