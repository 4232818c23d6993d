# The guest moves from host to host. On vda fio writes and verifies all the while. From vdb, whose
# contents are known, a quarter is read into the page cache once all of the memory was sent, and
# summed up on the next host: the device alone fills those pages, and a page that it did not
# report would have moved along with what it held before.
quarter() { dd if=/dev/vdb bs=1M skip=$(($1 % 4 * 16)) count=16 2>/dev/null; }
load_on /dev/vda --bs=4k
# The page cache of a block device lives as long as somebody has it open.
exec 4</dev/vdb
quarter 3 >/dev/null
i=0
while [ $i -lt $moves ]; do
    say ready n=$i
    hear sent 120
    drop_caches
    quarter $i >/dev/null
    reads=$(awk '{print $1}' /sys/block/vdb/stat)
    say filled n=$i
    hear moved 120
    got=$(quarter $i | md5sum | cut -d' ' -f1)
    same "$got" "$(echo $md5s | cut -d, -f$((i % 4 + 1)))" "the page cache after move $i"
    # Of 128 that fill it; one or two more the kernel may read ahead, behind the quarter.
    more=$(($(awk '{print $1}' /sys/block/vdb/stat) - reads))
    [ $more -lt 16 ] || fail "$more reads of vdb: not from the cache"
    # On the new host the disk is still that disk.
    drop_caches
    got=$(quarter $i | md5sum | cut -d' ' -f1)
    same "$got" "$(echo $md5s | cut -d, -f$((i % 4 + 1)))" "vdb after move $i"
    i=$((i + 1))
done
load_off
say rounds n=$(cat /tmp/rounds)
