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


def locks(directory):
    """Locks that other processes see on files of the directory: (inode, kind, from, to)."""
    inodes = {os.lstat(os.path.join(directory, name)).st_ino for name in os.listdir(directory)}
    held = []
    with open('/proc/locks') as f:
        for line in f:
            words = line.split()
            if words[1] != '->' and int(words[5].split(':')[2]) in inodes:
                held.append((int(words[5].split(':')[2]), words[1], words[3], words[6], words[7]))
    return sorted(held)


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
