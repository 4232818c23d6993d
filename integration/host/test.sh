#!/bin/sh
# On the host of the case `host`: what an administrator does who has a VM of libvirt on a vublk disk.
# It talks to the harness over the second serial port.
stty -F /dev/ttyS1 raw -echo
exec 3>/dev/ttyS1
control=/var/log/libvirt/vm1.control
step=start

say() { echo "@@ $*" >&3; }
ended() {
    rc=$?
    [ $rc = 0 ] && return
    systemctl status --no-pager 'vublk@*' libvirtd 2>&1 | tail -n 60
    journalctl --no-pager -n 60
    tail -n 20 $control
    say fail "$step ended with $rc"
    systemctl poweroff --no-block
}
trap ended EXIT
set -ex

count() { grep -ac '^@@ wrote' $control || true; }
# goes_on SECONDS: the guest writes two files more; the first one may have been under way.
goes_on() {
    want=$(($(count) + 2))
    limit=$(($(cut -d. -f1 /proc/uptime) + $1))
    until [ "$(count)" -ge $want ]; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt $limit ] || { step="$step: the guest does not write"; exit 1; }
        sleep 0.2
    done
}
daemon() { systemctl show -p MainPID --value vublk@vm1; }

say boot uptime=$(cut -d' ' -f1 /proc/uptime)
step=install
cd /srv/vublk
. ./install.sh
step='virsh start'
virsh -q define /srv/vm1.xml
virsh -q start vm1
step='the guest boots'
goes_on 900
step='AppArmor'
apparmor=off
if grep -q Y /sys/module/apparmor/parameters/enabled; then
    # QEMU is confined, with the package's rule in its profile. Debian 12's kernel mediates no Unix sockets: it would connect
    # without the rule, too.
    grep -q '^libvirt-.*(enforce)' /proc/$(pidof qemu-system-x86_64)/attr/current
    apparmor=enforced
fi
say writes uptime=$(cut -d' ' -f1 /proc/uptime) apparmor=$apparmor

for how in KILL TERM; do
    step="kill -$how"
    before=$(daemon)
    kill -$how "$before"
    goes_on 120
    [ "$(daemon)" != "$before" ]
    say killed how=$how
done
step=upgrade
before=$(daemon)
vublk upgrade /run/vublk/vm1/control
goes_on 120
[ "$(daemon)" != "$before" ]
step='systemctl restart'
systemctl restart vublk@vm1
goes_on 120
say upgraded
step='one connection'
[ "$(journalctl --no-pager -u vublk@vm1 | grep -c 'a front-end connected')" = 1 ]
say done rc=0
systemctl poweroff --no-block
