# Writers fill files of a file system, each file synced, and read back before it is written anew. What the files must hold
# is in the guest's memory, so it moves with the guest. At a `look` the harness is told how long the slowest file took since
# the last one, once each writer has written a file that it began after the `look`.
disk=/dev/vda
writers="0 1 2"
say disk bytes=$(blockdev --getsize64 $disk) kernel=$(uname -r)
mkfs.ext4 -q -F $disk
mount $disk /mnt
random_file /tmp/data 4
mkdir /tmp/sums

read_back() { dd if=/mnt/$1 bs=64k iflag=direct 2>/dev/null | md5sum | cut -d' ' -f1; }
counted() { cat /tmp/count.* | awk '{ n += $1 } END { print n }'; }
wrote() { for at in $writers; do [ "$(cat /tmp/count.$at 2>/dev/null || echo 0)" -ge "$(eval echo \$until$at)" ] || return 1; done; }

writer() {
    n=0
    while [ ! -e /tmp/stop ]; do
        file=w$1.$((n % files))
        [ ! -e /tmp/sums/$file ] || same "$(read_back $file)" "$(cat /tmp/sums/$file)" "md5 of $file before write $n"
        # No other file holds the same.
        { echo "write $n of $file"; dd if=/tmp/data bs=64k skip=$((n % 48)) count=16 2>/dev/null; } >/tmp/new.$1
        began=$(now)
        dd if=/tmp/new.$1 of=/mnt/$file bs=64k conv=fsync 2>/dev/null
        took=$((($(now) - began) * 10))
        md5sum </tmp/new.$1 | cut -d' ' -f1 >/tmp/sums/$file
        n=$((n + 1))
        echo $took >>/tmp/times.$1
        echo $n >/tmp/new.count.$1
        mv /tmp/new.count.$1 /tmp/count.$1
    done
}

for at in $writers; do
    eval until$at=2
    writer $at &
    eval pid$at=$!
done
wait_for 60 wrote
say loading

while read -r -t 180 word <&3 && [ "$word" = look ]; do
    for at in $writers; do eval until$at=$(($(cat /tmp/count.$at) + 2)); done
    wait_for 120 wrote
    longest=0
    for at in $writers; do
        mv /tmp/times.$at /tmp/seen
        for ms in $(cat /tmp/seen); do [ $ms -le $longest ] || longest=$ms; done
    done
    say load files=$(counted) longest_ms=$longest
done
[ "$word" = over ] || fail "expected over from the harness, got $word"
touch /tmp/stop
for at in $writers; do wait $(eval echo \$pid$at) || exit 1; done

drop_caches
for file in $(ls /tmp/sums); do
    want=$(cat /tmp/sums/$file)
    same "$(read_back $file)" "$want" "md5 of $file at the end"
    echo "$want  $file" >>/mnt/sums
done
say verified files=$(ls /tmp/sums | wc -l) written=$(counted)
umount /mnt
e2fsck -fn $disk >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "e2fsck found errors"; }
say fsck clean
