# What every guest script may use. Descriptor 3 is the control line to the harness.
# This shell prefers its own applets to programs of the same name in PATH: the full tools are
# called by path (/sbin/fallocate, /sbin/blkdiscard).

say() { echo "@@ $*" >&3; echo "@@ $*"; }
fail() { say fail "$*"; exit 1; }

# hear WORD [SECONDS]: the next line from the harness must be WORD.
hear() {
    read -r -t "${2:-60}" heard <&3 || fail "the harness did not send $1"
    [ "$heard" = "$1" ] || fail "expected $1 from the harness, got $heard"
}

# wait_for SECONDS COMMAND...: until the command succeeds; busybox has no better than to look again.
wait_for() {
    limit=$(($(cut -d. -f1 /proc/uptime) + $1))
    shift
    until "$@"; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt $limit ] || fail "waited too long for: $*"
        usleep 50000
    done
}

# Centiseconds since boot.
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }

# same A B WHAT
same() { [ "$1" = "$2" ] || fail "$3: $1 instead of $2"; }

drop_caches() { sync; echo 3 >/proc/sys/vm/drop_caches; }

# random_file PATH MIB: contents that no stale block can imitate. /dev/urandom is read
# once, then multiplied: it is slow under emulation.
random_file() {
    head -c 1048576 /dev/urandom >/tmp/seed
    i=0
    while [ $i -lt "$2" ]; do
        echo "block $i of $1 $(cat /proc/sys/kernel/random/uuid)"
        cat /tmp/seed
        i=$((i + 1))
    done | head -c $(($2 * 1048576)) >"$1"
}

# run_fio NAME OPTIONS...: a verify job that must end without an error.
run_fio() {
    name=$1
    shift
    longest_us=0
    started=$(now)
    if ! fio --name="$name" --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_dump=0 \
        --group_reporting --minimal --allow_mounted_write=1 "$@" >/tmp/fio.$name 2>&1; then
        grep -v '^[0-9];' /tmp/fio.$name | tail -n 20
        fail "fio $name: $(grep -v '^[0-9];' /tmp/fio.$name | grep -m1 -iE 'verify|error|err=' | tr -s ' ')"
    fi
    # Field 5 of the terse line is the error code; 6 and 47 are the KiB read and written; 15 and 56
    # the longest completion of both, in us.
    line=$(grep -m1 '^3;' /tmp/fio.$name) || fail "fio $name gave no result"
    same "$(echo "$line" | cut -d';' -f5)" 0 "error code of fio $name"
    for us in $(echo "$line" | cut -d';' -f15) $(echo "$line" | cut -d';' -f56); do
        [ $us -gt $longest_us ] && longest_us=$us
    done
    say fio name=$name read_kib=$(echo "$line" | cut -d';' -f6) written_kib=$(echo "$line" | cut -d';' -f47) \
        ms=$((($(now) - started) * 10))
}

# load_on DISK OPTIONS...: verify jobs, one after another, in the background until load_off; the
# first is done when this returns. /tmp/rounds counts them.
load_on() {
    load_disk=$1
    shift
    (
        n=0
        while [ ! -e /tmp/stop ]; do
            run_fio during$n --filename=$load_disk --rw=randwrite --iodepth=16 --size=8m --randseed=$n "$@"
            n=$((n + 1))
            echo $n >/tmp/rounds
        done
    ) &
    load=$!
    wait_for 60 test -e /tmp/rounds
}

load_off() {
    touch /tmp/stop
    wait $load || exit 1
}
