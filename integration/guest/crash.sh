# Verify after verify until the time is over, while the back-end is killed again and again.
end=$(($(now) + seconds * 100))
round=0
while [ $(now) -lt $end ]; do
    run_fio r$round --filename=/dev/vda --rw=randwrite --bs=4k --iodepth=32 --size=16m --randseed=$round
    round=$((round + 1))
done
say crashed rounds=$round
hear over 60
