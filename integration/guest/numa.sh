# Direct I/O from memory of each node in turn: nodes=0,1 are different memory regions.
for node in $(echo $nodes | tr , ' '); do
    n=/sys/devices/system/node/node$node
    [ -d $n ] || fail "no memory node $node"
    say node id=$node mib=$(($(awk '/MemTotal/ {print $4}' $n/meminfo) / 1024))
    run_fio node$node --filename=/dev/vda --rw=randwrite --bsrange=512-512k --iodepth=16 --size=$size \
        --numa_mem_policy=bind:$node --thread=0
done
