# vda is pulled out under load; another disk comes in its place and must work.
fio --name=load --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randrw --bs=16k --iodepth=32 \
    --time_based --runtime=300 --size=32m >/tmp/fio 2>&1 &
load=$!
busy() { [ "$(awk '{print $1 + $5}' /sys/block/vda/stat)" -gt 400 ]; }
wait_for 60 busy
say loading
gone() { [ ! -e /sys/block/vda ]; }
wait_for 90 gone
# The load ends with errors, which is right; that it ends is the point.
ended() { ! kill -0 $load 2>/dev/null; }
wait_for 60 ended
say gone
back() { ls /sys/block | grep -q '^vd'; }
wait_for 90 back
disk=$(ls /sys/block | grep -m1 '^vd')
wait_for 30 test -b /dev/$disk
say back disk=$disk serial=$(cat /sys/block/$disk/serial)
run_fio second --filename=/dev/$disk --rw=randwrite --bsrange=512-512k --iodepth=16 --size=8m
