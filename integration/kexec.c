/* kexec-load KERNEL INITRD COMMAND_LINE: loads the next kernel; `kexec-load` alone starts it.
 * For the kexec test's guest: the usual tool wants libraries of Xen, and this is all of it. */
#include <fcntl.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc == 1) {
        syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
        perror("reboot");
        return 1;
    }
    if (argc != 4) {
        fprintf(stderr, "usage: kexec-load [KERNEL INITRD COMMAND_LINE]\n");
        return 2;
    }
    int kernel = open(argv[1], O_RDONLY | O_CLOEXEC), initrd = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (kernel < 0 || initrd < 0 ||
        syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[3]) + 1, argv[3], 0) != 0) {
        perror("kexec-load");
        return 1;
    }
    return 0;
}
