# SPDX-License-Identifier: Apache-2.0
"""A small Linux guest whose only disk is an NBD export, and which boots from that disk.

QEMU (emulated, so that it runs everywhere) starts the firmware, which reads the boot sector, the boot
loader and Debian's cloud kernel from the export; the rest of the guest is busybox and the script INIT.
The disk has three partitions: what it boots from, an ext4 file system, and one that it uses without any
file system (the data partition). Host and guest talk in lines over the serial port.
"""
import glob
import gzip
import os
import select
import struct
import subprocess
import time

import silence
from harness import KiB, MiB, run, which

BOOT, FS, DATA = (1 * MiB, 20 * MiB), (21 * MiB, 16 * MiB), (37 * MiB, 8 * MiB)  # (offset, length)
SIZE = DATA[0] + DATA[1] + MiB  # the last MiB belongs to nobody
BLOCK, N_BLOCKS = 4 * KiB, 256  # of one round of the writer, at the start of the data partition
N_FILES = 8  # the writer's files, used in turn; each holds the first FILE_SIZE bytes of its round
FILE_SIZE = 128 * KiB
OLD = (4 * MiB, 4 * MiB)  # in the data partition: filled with 'T' once, then trimmed in TRIMMED
TRIMMED = (5 * MiB, 2 * MiB)
SLOW = 600  # seconds, for all that it does: it is emulated, and the machine may be busy
MBR_CODE = '/usr/lib/syslinux/mbr/mbr.bin'
BUSYBOX = '/bin/busybox'
# The kernel's checks of clocks fail by chance in an emulated machine on a busy host; the rest saves time.
KERNEL_WORDS = ('console=ttyS0 panic=-1 no_timer_check tsc=reliable edd=off cryptomgr.notests '
                '8250.nr_uarts=1')

# Written in order, each block after the one before was answered: so the disk always holds the first
# blocks of one round and the others of the round before. A file's fsync has ended when its round is told.
INIT = f'''#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
mount -t proc p /proc
mount -t sysfs s /sys
mount -t devtmpfs d /dev
for m in $(cat /modules/order); do insmod /modules/$m; done
dmesg -n 1
echo guest: cache $(cat /sys/block/vda/queue/write_cache)
mount -t ext4 /dev/vda2 /mnt
tr '\\0' T </dev/zero | dd of=/dev/vda3 bs=64k seek={OLD[0] // 65536} count={OLD[1] // 65536} \\
  iflag=fullblock conv=fsync 2>/dev/null
(read -r line </dev/ttyS0; : >/stop) &
n=0
while [ ! -e /stop ]; do
  n=$((n + 1))
  awk -v n=$n 'BEGIN {{ for (i = 0; i < {N_BLOCKS}; i++) printf "%-{BLOCK - 1}s\\n", "round " n " block " i }}' >/pattern
  dd if=/pattern of=/dev/vda3 bs={BLOCK} oflag=direct 2>/dev/null
  dd if=/pattern of=/mnt/$((n % {N_FILES})) bs=64k count={FILE_SIZE // 65536} conv=fsync 2>/dev/null
  echo guest: round $n
done
rm /mnt/$((n % {N_FILES}))
fstrim /mnt
umount /mnt
blkdiscard -o {TRIMMED[0]} -l {TRIMMED[1]} /dev/vda3
echo guest: data $(dd if=/dev/vda3 bs=64k iflag=direct 2>/dev/null | sha256sum)
echo guest: end
poweroff -f
'''


def kernel():
    """Path of the newest cloud kernel that has its modules, or None."""
    found = [k for k in sorted(glob.glob('/boot/vmlinuz-*cloud*')) if os.path.isdir(modules_dir(k))]
    return found[-1] if found else None


def modules_dir(image):
    return '/lib/modules/' + os.path.basename(image).split('-', 1)[1]


def missing():
    """What is not here and a guest needs, as a reason for a skip; '' if it can run."""
    tools = [t for t in ('qemu-system-x86_64', 'syslinux', 'mformat', 'mcopy', 'mke2fs') if not which(t)]
    files = [f for f in (MBR_CODE, BUSYBOX) if not os.path.exists(f)]
    return ', '.join(tools + files + ([] if kernel() else ['linux-image-cloud-amd64']))


def block(n, i):
    """Block i of what round n writes."""
    return f'round {n} block {i}'.ljust(BLOCK - 1).encode() + b'\n'


def pattern(n):
    """All that round n writes."""
    return b''.join(block(n, i) for i in range(N_BLOCKS))


def partition_table(code=b''):
    """The first sector of the disk, with this boot code."""
    entries = b''.join(struct.pack('<B3xB3xII', active, kind, off // 512, length // 512)
                       for active, kind, (off, length) in ((0x80, 0x0e, BOOT), (0, 0x83, FS), (0, 0x83, DATA)))
    return code[:440].ljust(446, b'\0') + entries.ljust(64, b'\0') + b'\x55\xaa'


def cpio(members):
    """An archive in the form that the kernel unpacks; members are (name, mode, content)."""
    out = b''
    for i, (name, mode, data) in enumerate([*members, ('TRAILER!!!', 0, b'')]):
        head = [i + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out += b'070701' + b''.join(b'%08X' % v for v in head) + name.encode() + b'\0'
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return out


def initramfs():
    base = modules_dir(kernel())
    with open(base + '/modules.dep') as f:
        needs = dict(line.rstrip('\n').split(':') for line in f)
    order = []
    for name, others in needs.items():
        if os.path.basename(name).split('.')[0] in ('virtio_blk', 'virtio_pci'):
            order += [m for m in [*others.split()[::-1], name] if m not in order]
    members = [(d, 0o40755, b'') for d in ('bin', 'dev', 'proc', 'sys', 'mnt', 'modules')]
    members.append(('init', 0o100755, INIT.encode()))
    members.append(('modules/order', 0o100644, '\n'.join(map(os.path.basename, order)).encode()))
    for path, name in [(BUSYBOX, 'bin/busybox')] + [(f'{base}/{m}', 'modules/' + os.path.basename(m)) for m in order]:
        with open(path, 'rb') as f:
            members.append((name, 0o100755, f.read()))
    return gzip.compress(cpio(members), 1)


def make_disk(path, scratch):
    """Make the guest's disk, a file at `path`; `scratch` is a directory for what goes into it."""
    loader, ramdisk = os.path.join(scratch, 'syslinux.cfg'), os.path.join(scratch, 'initrd.gz')
    with open(loader, 'w') as f:
        f.write('serial 0 115200\ndefault linux\nlabel linux\nkernel vmlinuz\ninitrd initrd.gz\n'
                f'append {KERNEL_WORDS}\n')
    with open(ramdisk, 'wb') as f:
        f.write(initramfs())
    with open(MBR_CODE, 'rb') as f:
        code = f.read()
    with open(path, 'wb') as f:
        f.write(partition_table(code))
        f.truncate(SIZE)
    fat = f'{path}@@{BOOT[0]}'
    run('mformat', '-i', fat, '-T', str(BOOT[1] // 512), '-H', str(BOOT[0] // 512), '-h', '64', '-s', '32', '::')
    run('mcopy', '-i', fat, loader, ramdisk, '::')
    run('mcopy', '-i', fat, kernel(), '::vmlinuz')
    run('syslinux', '--install', '--offset', str(BOOT[0]), path)
    run('mke2fs', '-q', '-F', '-t', 'ext4', '-E', f'offset={FS[0]}', path, f'{FS[1] // KiB}k')


class Guest:
    """A running guest on an export of `daemon`; ends with the block."""

    def __init__(self, daemon, uri, limit=SLOW):
        self.daemon = daemon
        self.end = time.monotonic() + limit
        self.seen, self.text = b'', b''  # what was read; what of it was not yet asked for
        self.proc = subprocess.Popen(
            [which('qemu-system-x86_64'), '-accel', 'tcg', '-M', 'pc', '-m', '192', '-nodefaults', '-no-user-config',
             '-display', 'none', '-no-reboot', '-serial', 'stdio',
             '-drive', f'file={uri},if=virtio,format=raw,discard=unmap'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.proc.kill()
        self.proc.wait()

    def line(self, word):
        """The rest of the next line that begins with `guest: WORD `."""
        begin = f'guest: {word}'.encode()
        while True:
            line, newline, rest = self.text.partition(b'\n')
            if not newline:
                self.read()
                continue
            self.text = rest
            if line.startswith(begin):
                return line[len(begin):].decode().strip()

    def read(self):
        ready, _, _ = select.select([self.proc.stdout], [], [], max(0, self.end - time.monotonic()))
        data = os.read(self.proc.stdout.fileno(), 65536) if ready else b''
        self.seen += data
        if not ready:
            print(silence.describe(self.proc.pid), self.daemon.doing())
        assert data, f'the guest {"ended" if ready else "is too slow"}: {self.seen.decode(errors="replace")}'
        self.text += data

    def stop(self):
        """Ask the writer to end after its round."""
        self.proc.stdin.write(b'stop\n')
        self.proc.stdin.flush()
