# SPDX-License-Identifier: Apache-2.0
"""All that a list must give back: what queries tell, locks, names, inodes and bytes of a directory."""
import hashlib
import os

PASSING = ('log', 'qmp.sock', 'nbd.sock')


def files(directory):
    """{name: what it is}, for every name in the directory."""
    found = {}
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        st = os.lstat(path)
        data = None
        if name in PASSING:
            continue
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, 'rb') as f:
                data = hashlib.sha256(f.read()).hexdigest()
        found[name] = (st.st_ino, oct(st.st_mode), st.st_nlink, st.st_size, data)
    return found


def read_locks(wanted):
    held = []
    with open('/proc/locks') as f:
        for line in f:
            words = line.split()
            device, _, inode = words[5].rpartition(':') if words[1] != '->' else (None, None, None)
            if (device, inode) in wanted:
                held.append((int(inode), words[1], words[3], words[6], words[7]))
    return sorted(held)


def locks(directory):
    """Locks that other processes see on files of the directory: (inode, kind, from, to)."""
    stats = [os.lstat(os.path.join(directory, name)) for name in os.listdir(directory)]
    wanted = {(f'{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}', str(st.st_ino)) for st in stats}
    # The file is not read at one go: while other processes lock, a line may come twice, or not at all.
    held = read_locks(wanted)
    while (again := read_locks(wanted)) != held:
        held = again
    return held


def open_files(d):
    """Files of its directory that the daemon has open."""
    found = []
    for fd in os.listdir(f'/proc/{d.proc.pid}/fd'):
        try:
            path = os.readlink(f'/proc/{d.proc.pid}/fd/{fd}')
        except FileNotFoundError:
            continue
        name = path.removeprefix(d.dir + '/')
        if name != path and name not in PASSING:
            found.append(name)
    return sorted(found)


def bits(d):
    return {(n['node-name'], b['name']): d.sha256(n['node-name'], b['name'])
            for n in d.cmd('query-named-block-nodes') for b in n.get('dirty-bitmaps', [])}


def whole_state(d):
    """Nodes in their order, with their bitmaps; their bits; jobs; exports; files; what is open; locks."""
    nodes = d.cmd('query-named-block-nodes')
    for n in nodes:
        n['image'].pop('actual-size', None)  # others write to these files, too
    return {'nodes': nodes, 'bits': bits(d), 'jobs': d.cmd('query-jobs'), 'exports': d.cmd('query-block-exports'),
            'files': files(d.dir), 'open': open_files(d), 'locks': locks(d.dir)}
