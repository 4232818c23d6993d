# I/O goes on while memory is plugged in; then I/O from buffers in the new memory.
echo online >/sys/devices/system/memory/auto_online_blocks
before=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
load_on /dev/vda --bsrange=512-512k
say loading
hear plugged 90
grown() { [ $(awk '/MemTotal/ {print $2}' /proc/meminfo) -ge $((before + $mib * 1024)) ]; }
wait_for 60 grown
seen=$(cat /tmp/rounds)
more() { [ $(cat /tmp/rounds) -gt $seen ] || ! kill -0 $load; }
wait_for 60 more
load_off
say grown rounds=$(cat /tmp/rounds) mib=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024))
run_fio plugged --filename=/dev/vda --rw=randwrite --bsrange=512-512k --iodepth=16 --size=16m --numa_mem_policy=bind:1
