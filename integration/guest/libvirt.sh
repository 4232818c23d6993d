# A VM of libvirt. fio writes and verifies on vda all the while, whatever happens to the VM, and on each disk that is attached
# until it is detached. What the first life wrote is compared in each round, and in each life after that.
#
# It tells and hears nothing: on the next host nobody may have to say anything to it.
modprobe evdev
modprobe button
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\ntouch /tmp/button\n' >/etc/acpi/PWRF/00000080
chmod 755 /etc/acpi/PWRF/00000080
acpid -f -l /dev/null &

kept() { dd if=/dev/vda bs=1M skip=64 count=4 iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1; }
sum=$(dd if=/dev/vda bs=512 skip=$((72 * 2048)) count=1 iflag=direct 2>/dev/null | tr -d '\0')
if [ -z "$sum" ]; then
    random_file /tmp/data 4
    dd if=/tmp/data of=/dev/vda bs=1M seek=64 oflag=direct conv=fsync 2>/dev/null
    sum=$(md5sum </tmp/data | cut -d' ' -f1)
    echo $sum | dd of=/dev/vda bs=512 seek=$((72 * 2048)) conv=sync,fsync 2>/dev/null
    say life new=1
else
    say life new=0
fi

# Disks that come: verified until they go. Then fio may fail, but not because it read other bytes than it wrote.
visitors() {
    n=0
    while :; do
        for disk in $(ls /sys/block | grep '^vd[b-z]'); do
            [ -b /dev/$disk ] || continue
            serial=$(cat /sys/block/$disk/serial 2>/dev/null) || continue
            if fio --name=visitor --filename=/dev/$disk --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_dump=0 \
                --rw=randwrite --bsrange=512-64k --iodepth=16 --size=4m --randseed=$n --minimal >/tmp/visitor 2>&1; then
                say visited disk=$disk serial=$serial n=$n
                n=$((n + 1))
                continue
            fi
            if grep -q 'verify: bad' /tmp/visitor; then fail "$disk: $(grep -m1 'verify: bad' /tmp/visitor)"; fi
            gone() { [ ! -e /sys/block/$disk ]; }
            wait_for 30 gone
            say left disk=$disk
        done
        usleep 100000
    done
}
( exec 2>/tmp/trace.visitors; visitors ) &

round=0
while [ ! -e /tmp/button ]; do
    run_fio r$round --filename=/dev/vda --rw=randwrite --bsrange=512-64k --iodepth=16 --size=4m --randseed=$round
    same "$(kept)" "$sum" "what the first life wrote"
    say round n=$round size=$(cat /sys/block/vda/size) longest_ms=$((longest_us / 1000)) uptime=$(cut -d' ' -f1 /proc/uptime)
    round=$((round + 1))
done
say stopped rounds=$round
