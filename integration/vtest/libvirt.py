"""VMs of libvirt on two hosts, each a Debian 12 with systemd, libvirt, QEMU and the units of the package, in namespaces of this
machine. Their guest writes and verifies all the while (guest/libvirt.sh).

The memory's and the disk's XML are those of docs/libvirt.md, and so are the commands and the XML that libvirt refuses, with what
it says then.
"""

import contextlib
import os
import re
import shutil
import time

from .core import MIB, REPO, VUBLKD, Failed, join_layers, kernel_image
from .debian import Debian, read, wait
from .registry import BOOT, case

DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>512</memory>
  {memory}
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{folder}/vmlinuz</kernel>
    <initrd>{folder}/initrd</initrd>
    <cmdline>console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr vt={script}</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    {disk}
    <serial type='file'><source path='{said}/{name}.console' append='on'/><target port='0'/></serial>
    <serial type='file'><source path='{said}/{name}.control' append='on'/><target port='1'/></serial>
  </devices>
</domain>
"""


def page():
    return read(f"{REPO}/docs/libvirt.md")


def xml_of(name, dev="vda"):
    """The memory and a disk, as the page has them."""
    memory, disk = re.findall(r"^```xml\n(.*?)^```", page(), re.S | re.M)[:2]
    return memory, disk.replace("/vm1.sock", f"/{name}.sock").replace("'vda'", f"'{dev}'")


def domain(name="vm1", folder="/srv/vms", said="/srv/vms", script="libvirt"):
    """`folder`: where the kernel is; `said`: where the guest's serial ports go."""
    memory, disk = xml_of(name)
    return DOMAIN.format(name=name, folder=folder, said=said, script=script, memory=memory, disk=disk)


class Host:
    """`address`: in the network that the hosts have for themselves."""

    def __init__(self, t, name, address, shared):
        self.t, self.name, self.address = t, name, address
        self.debian = Debian(t.stack, "libvirt", t.tmp, in_memory=True)
        root = self.debian.root
        target = os.path.dirname(os.path.dirname(VUBLKD))
        t.run("make", "-s", "-C", REPO, "install", f"DESTDIR={root}", "PREFIX=/usr", "BUILT=1", f"TARGET={target}")
        files = {
            "etc/hostname": f"{name}\n",
            # Without its time-out, after which it would number its VMs from 1 again.
            "etc/default/libvirtd": "LIBVIRTD_ARGS=\n",
        }
        example = read(f"{REPO}/dist/systemd/examples/image-elsewhere.conf")
        for vm in ("vm1", "vm2", "vm3"):
            files[f"etc/vublk/{vm}.env"] = f"BLK_FILE=/srv/vms/{vm}.raw\n"
            files[f"etc/systemd/system/vublk@{vm}.service.d/image.conf"] = example.replace("vm1", vm)
        for path, text in files.items():
            os.makedirs(os.path.dirname(f"{root}/{path}"), exist_ok=True)
            with open(f"{root}/{path}", "w", encoding="utf-8") as out:
                out.write(text)
        with open(f"{root}/etc/libvirt/libvirtd.conf", "a", encoding="utf-8") as out:
            out.write('auth_tcp = "none"\n')
        self.debian.start(shared)
        t.stack.callback(self.keep_logs)
        self.run("systemctl", "start", *[f"vublk@{vm}.socket" for vm in ("vm1", "vm2", "vm3")], "libvirtd-tcp.socket")

    def keep_logs(self):
        with contextlib.suppress(Exception), open(f"{self.t.logs}/{self.name}.log", "w", encoding="utf-8") as out:
            out.write(self.debian.journal() + self.debian.journal("libvirtd"))
        for path in [f"{self.debian.root}/var/log/libvirt/qemu/{vm}.log" for vm in ("vm1", "vm3")]:
            with contextlib.suppress(OSError):
                shutil.copy(path, f"{self.t.logs}/{self.name}.qemu.{os.path.basename(path)}")

    def run(self, *words, seconds=60, **how):
        return self.t.run(*self.debian.inside(*words), timeout=seconds, **how)

    def virsh(self, *words, seconds=60):
        """How many seconds it took, too."""
        start = time.monotonic()
        said = self.run("virsh", "-q", *words, seconds=seconds)
        return said, time.monotonic() - start

    def refused(self, want, *words, seconds=60):
        """virsh fails and says why. How many seconds it took."""
        start = time.monotonic()
        said = self.run("virsh", "-q", *words, seconds=seconds, ok=range(256))
        if want not in said or "error: " not in said:
            raise Failed(f"virsh {' '.join(words)}: it does not say {want!r}, but {said.strip()[-200:]!r}")
        return time.monotonic() - start

    def options(self, vm, *options):
        """Further ones of vublkd, from its next start on."""
        with open(f"{self.debian.root}/etc/vublk/{vm}.env", "w", encoding="utf-8") as out:
            out.write(f"BLK_FILE=/srv/vms/{vm}.raw\nVUBLKD_OPTIONS={' '.join(options)}\n")

    def await_log(self, vm, words, times=1):
        def has_logged():
            return self.run("journalctl", "--no-pager", "-q", "-o", "cat", "-u", f"vublk@{vm}").count(words) >= times

        wait(f"{words!r} in the log of {vm} on {self.name}", has_logged, 20)


class Said:
    """What the guest says, in a file that outlives its QEMU."""

    def __init__(self, t, path):
        self.t, self.path, self.at, self.partial, self.lines = t, path, 0, b"", []
        t.stack.callback(lambda: shutil.copytree(os.path.dirname(path), f"{t.logs}/said", ignore=self.others))

    @staticmethod
    def others(_, names):
        return [name for name in names if not name.endswith((".console", ".control"))]

    def take_in(self):
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self.at)
            data = file.read()
            self.at += len(data)
            *lines, self.partial = (self.partial + data).split(b"\n")
            for line in lines:
                line = line.decode(errors="replace").strip()
                if line.startswith("@@ fail"):
                    raise Failed(f"in the guest: {line[8:]}")
                if line.startswith("@@ "):
                    self.t.note(f"guest: {line}")
                    words = line[3:].split()
                    self.lines.append((words[0], dict(word.partition("=")[::2] for word in words[1:])))

    def expect(self, word, seconds, **want):
        """The next line that starts with `word`, with these values, as a dictionary."""

        def take():
            self.take_in()
            for i, (first, values) in enumerate(self.lines):
                if first == word and all(values.get(name) == value for name, value in want.items()):
                    del self.lines[: i + 1]
                    return values

        return wait(f"'{word}' {want or ''} from the guest", take, seconds)

    def goes_on(self, **want):
        """The guest writes and verifies from now on: the first round may have been under way."""
        self.take_in()
        self.lines.clear()
        self.expect("round", BOOT)
        return self.expect("round", BOOT, **want)


def hosts(t, count):
    """The hosts, and what their guest says. They share /srv/vms, with the disks vm1 and vm2; there is none for vm3."""
    t.only_vublkd("the units start vublkd")
    shared = f"{t.tmp}/shared"
    os.mkdir(shared)
    found = [Host(t, f"host-{n}", f"10.9.0.{n}", shared) for n in range(1, count + 1)]
    owner = next(line.split(":")[2] for line in read(f"{found[0].debian.root}/etc/passwd").splitlines() if line.startswith("vublk:"))
    for vm in ("vm1", "vm2"):
        path = f"{shared}/{vm}.raw"
        with open(path, "wb") as out:
            out.truncate(128 * MIB)
        os.chown(path, int(owner), int(owner))
        os.chmod(path, 0o600)
    shutil.copy(kernel_image(), f"{shared}/vmlinuz")
    join_layers(f"{shared}/initrd", ("base", "fio"))
    for vm in ("vm1", "vm3", "vm4"):
        with open(f"{shared}/{vm}.xml", "w", encoding="utf-8") as out:
            out.write(domain(vm))
        with open(f"{shared}/{vm}-disk.xml", "w", encoding="utf-8") as out:
            out.write(xml_of(vm, "vdb")[1])
    with open(f"{shared}/vm2-disk.xml", "w", encoding="utf-8") as out:
        out.write(xml_of("vm2", "vdb")[1])
    return found, Said(t, f"{shared}/vm1.control")


def start_and_attach(t, host, guest, turns):
    """Start, attach, detach under load; and disks that cannot be served."""
    host.virsh("define", "/srv/vms/vm1.xml")
    _, took = host.virsh("start", "vm1")
    t.fact(f"start {took:.1f} s")
    guest.expect("life", BOOT, new="1")
    guest.goes_on()
    for turn in range(turns):
        _, attach = host.virsh("attach-device", "vm1", "/srv/vms/vm2-disk.xml", "--live")
        guest.expect("visited", BOOT, disk="vdb")
        guest.expect("visited", BOOT, disk="vdb")
        _, detach = host.virsh("detach-device", "vm1", "/srv/vms/vm2-disk.xml", "--live")
        host.await_log("vm2", "the front-end disconnected", turn + 1)
        if "vdb" in host.virsh("domblklist", "vm1")[0]:
            raise Failed("the disk is still there after its detachment")
        guest.goes_on()
    t.fact(f"attach {attach:.1f} s, detach {detach:.1f} s")
    # The disk has no file; QEMU tries four times. In a hot-plug all the guest waits for the answer.
    never = "vhost_backend_init failed: Protocol error"
    took = [
        host.refused(never, "create", "/srv/vms/vm3.xml"),
        host.refused(never, "attach-device", "vm1", "/srv/vms/vm3-disk.xml", "--live"),
    ]
    t.fact("refused start {:.1f} s, attach {:.1f} s".format(*took))
    if max(took) > 6:
        raise Failed("a disk that cannot be served kept libvirt waiting")
    host.await_log("vm3", "no such file. Create it first")
    # Its socket is not there at all.
    host.refused("Failed to connect", "create", "/srv/vms/vm4.xml")
    host.refused("Failed to connect", "attach-device", "vm1", "/srv/vms/vm4-disk.xml", "--live")
    if "vdb" in host.virsh("domblklist", "vm1")[0]:
        raise Failed("a disk that was refused is there")
    guest.goes_on()


@case("libvirt-attach", 240)
def attach(t):
    """VM of libvirt: start, disks attached and detached under load, disks that cannot be served"""
    (host,), guest = hosts(t, 1)
    start_and_attach(t, host, guest, 1)


def resets_and_saves(t, host, guest):
    host.virsh("reset", "vm1")
    guest.expect("life", BOOT, new="0")
    guest.goes_on()
    host.virsh("suspend", "vm1")
    host.virsh("resume", "vm1")
    guest.goes_on()
    _, save = host.virsh("save", "vm1", "/srv/vms/vm1.save")
    _, restore = host.virsh("restore", "/srv/vms/vm1.save")
    guest.goes_on()
    t.fact(f"save {save:.1f} s, restore {restore:.1f} s")
    host.virsh("managedsave", "vm1")
    host.virsh("start", "vm1")
    guest.goes_on()


def rows(first):
    """The page's tables of what libvirt refuses: what begins so, and what libvirt says."""
    found = re.findall(rf"^\| `({first}[^`]*)` \| `([^`]*)` \|", page(), re.M)
    if len(found) < 5:
        raise Failed(f"docs/libvirt.md has only {found}")
    return found


def refuses(t, host, guest):
    """What the page says that libvirt refuses, and what replaces some of it."""
    for command, says in rows("virsh "):
        host.refused(says, *command.split()[1:])
    shared = os.path.dirname(guest.path)
    attributes, elements = rows(r"\w+="), rows("<")
    for what, says in attributes + elements:
        text = domain("vm9")
        if what.startswith("<"):
            text = text.replace("</disk>", f"{what}</disk>")
        else:
            text = text.replace("<driver name='qemu'", f"<driver name='qemu' {what}")
        with open(f"{shared}/vm9.xml", "w", encoding="utf-8") as out:
            out.write(text.replace("<vcpu>", "<iothreads>1</iothreads><vcpu>"))
        host.refused(says, "define", "/srv/vms/vm9.xml")
    t.fact(f"{len(rows('virsh '))} commands and {len(attributes) + len(elements)} pieces of XML refused as the page says")
    host.run("vublk", "resize", "vm1", "160M")
    guest.goes_on(size=str(160 * MIB // 512))
    host.run("vublk", "throttle", "vm1", "--iops-total=500")
    guest.goes_on()
    host.run("vublk", "throttle", "vm1", "--iops-total=0")


def migrate(t, source, target, guest):
    """Refused while the target's daemon has no --incoming, which it says; then done."""
    words = ["--live", "--persistent", "--undefinesource", "vm1", f"qemu+tcp://{target.address}/system", f"tcp://{target.address}"]
    target.run("systemctl", "stop", "vublk@vm1.service")
    target.options("vm1")
    took = source.refused("vhost_backend_init failed: Protocol error", "migrate", *words)
    target.await_log("vm1", "for a VM that comes from there by live migration add --incoming")
    if took > 6:
        raise Failed(f"a migration target without --incoming took {took:.1f} s to say no")
    guest.goes_on()
    target.options("vm1", "--incoming")
    target.run("systemctl", "stop", "vublk@vm1.service")
    _, seconds = source.virsh("migrate", *words, seconds=180)
    pause = int(re.search(r"Total downtime: +(\d+) ", target.virsh("domjobinfo", "vm1", "--completed")[0]).group(1))
    source.await_log("vm1", "the front-end disconnected")
    guest.goes_on()
    if "vm1" in source.virsh("list", "--all")[0]:
        raise Failed("the VM is still on the host that it left")
    # It has done its work: a successor is started without it.
    target.options("vm1")
    target.run("vublk", "upgrade", "vm1")
    guest.goes_on()
    t.fact(f"migration refused in {took:.1f} s, done in {seconds:.1f} s, pause {pause} ms")


def shut_down(t, host, guest):
    """libvirt-guests stops the VM while its disk still serves."""
    start = time.monotonic()
    host.run("systemctl", "start", "libvirt-guests")
    host.run("systemctl", "poweroff", "--no-block")
    guest.expect("stopped", 60)
    wait("end of the host", lambda: host.debian.unshare.poll() is not None, 60)
    t.fact(f"shutdown {time.monotonic() - start:.1f} s")


@case("libvirt", 900)
def libvirt(t):
    """VM of libvirt: attach, reset, save, what libvirt refuses, migration between two hosts and back, shutdown of its host"""
    (first, second), guest = hosts(t, 2)
    t.run("ip", "link", "add", "vublk", "netns", first.debian.pid, "type", "veth", "peer", "name", "vublk", "netns", second.debian.pid)
    for host in (first, second):
        for words in (["addr", "add", f"{host.address}/24", "dev", "vublk"], ["link", "set", "vublk", "up"]):
            t.run("nsenter", "--target", host.debian.pid, "--net", "ip", *words)
    start_and_attach(t, first, guest, 3)
    resets_and_saves(t, first, guest)
    refuses(t, first, guest)
    migrate(t, first, second, guest)
    migrate(t, second, first, guest)
    shut_down(t, first, guest)
