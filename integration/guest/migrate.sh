# Two loads while the guest moves from host to host. vda: fio writes and verifies. vdb: its
# contents, known before, are read into the page cache, which only the device fills; a page
# that did not move along would show in the sum of the cached bytes.
want=$(dd if=/dev/vdb bs=1M iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1)
same "$want" "$md5" "contents of vdb"
load_on /dev/vda --bs=4k
(
    n=0
    while [ ! -e /tmp/stop ]; do
        drop_caches
        cat /dev/vdb >/dev/null
        n=$((n + 1))
        echo $n >/tmp/cached
        got=$(md5sum </dev/vdb | cut -d' ' -f1)
        same "$got" "$want" "the page cache after $n rounds"
    done
) &
cached=$!
wait_for 90 test -e /tmp/cached
i=0
while [ $i -lt $moves ]; do
    say ready n=$i
    hear moved 120
    # Once more round the cache and the disk on the new host.
    seen=$(cat /tmp/cached)
    more() { [ $(cat /tmp/cached) -gt $((seen + 1)) ] || ! kill -0 $cached; }
    wait_for 90 more
    i=$((i + 1))
done
load_off
wait $cached || exit 1
say rounds n=$(cat /tmp/cached)
