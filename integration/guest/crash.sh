# Verify after verify until the time is over, while the back-end is killed again and again.
# Beside it long writes: this guest takes longer to check a block than a disk to write one, and most
# kills are to find some in flight.
fio --name=long --filename=/dev/vda --offset=32m --size=32m --rw=randwrite --bs=512k --ioengine=libaio --direct=1 \
    --iodepth=16 --time_based --runtime=$seconds --minimal >/tmp/long 2>&1 &
long=$!
end=$(($(now) + seconds * 100))
round=0
longest=
while [ $(now) -lt $end ]; do
    run_fio r$round --filename=/dev/vda --rw=randwrite --bs=4k --iodepth=32 --size=16m --randseed=$round
    round=$((round + 1))
    longest=$longest,$((longest_us / 1000))
done
wait $long || fail "the long writes ended with $?: $(tail -n 1 /tmp/long)"
say crashed rounds=$round longest_ms=${longest#,}
hear over 60
