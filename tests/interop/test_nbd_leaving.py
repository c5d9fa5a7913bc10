# SPDX-License-Identifier: Apache-2.0
"""Connections end when their client has gone, and go on when others give up, whatever is under way."""
import contextlib
import os
import resource
import threading
import time

import pytest

from backup_tools import backup_args, content, fill, until
from harness import DEADLINE, Daemon, GiB, KiB, MiB, QmpError
from nbd_raw import CACHE, READ, STATUS, WRITE, ZERO, Raw, ext_request

HUGE = 1 << 62


def connections(d):
    n = 0
    for fd in os.listdir(f'/proc/{d.proc.pid}/fd'):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            n += os.readlink(f'/proc/{d.proc.pid}/fd/{fd}').startswith('socket')
    return n


@pytest.fixture
def d():
    with Daemon() as daemon:
        daemon.cmd('blockdev-add', driver='null-co', node_name='n', size=HUGE)
        daemon.export('n')
        daemon.before = connections(daemon)
        yield daemon


@pytest.mark.parametrize('count', [1, 16, 17, 100])
def test_long_zeroes_of_a_client_that_has_gone(d, count):
    """Also when there are so many that the daemon reads no more of it."""
    c = Raw(d.nbd_path)
    c.go('n', mode='extended')
    c.send(ext_request(ZERO, 0, HUGE) * count)
    c.close()
    until('the connection has ended', lambda: connections(d) == d.before)
    d.cmd('block-export-del', id='exp-n')


def test_long_caching_of_a_client_that_has_gone():
    with Daemon(['--object', 'throttle-group,id=tg,limits.bps-total=16777216']) as d:
        fill(d.add_disk('disk', 512 * MiB), MiB)
        with open(d.path('disk.raw'), 'r+b') as f:
            os.posix_fallocate(f.fileno(), 0, 512 * MiB)
        d.cmd('blockdev-add', driver='throttle', node_name='t', throttle_group='tg', file='disk')
        d.export('t')
        before = connections(d)
        c = Raw(d.nbd_path)
        c.go('t', mode='extended')
        for _ in range(5):
            c.ask(CACHE, 0, 512 * MiB)
        c.close()
        until('the connection has ended', lambda: connections(d) == before)


def test_a_payload_that_is_lost_ends_the_connection(d):
    """What else was under way does not hold it."""
    c = Raw(d.nbd_path)
    c.go('n', mode='extended')
    c.ask(ZERO, 0, HUGE)
    c.asked[9] = (0, 0)
    c.send(ext_request(WRITE, 0, 4096, 0, 9))
    assert {c.reply().error, c.reply().error} == {22, 108}  # EINVAL; ESHUTDOWN for the zeroes
    assert c.at_end()
    until('the connection has ended', lambda: connections(d) == d.before)


def test_a_list_that_gives_up_leaves_the_connection_as_it_was():
    """It waits for a request that takes longer than it will wait; what came meanwhile is then served."""
    with Daemon() as d:
        d.cmd('blockdev-add', driver='null-co', node_name='n', size=GiB, latency_ns=7 * 10**9)
        d.export('n')
        c = Raw(d.nbd_path)
        c.go('n', mode='structured', contexts=['base:allocation'])
        slow = c.ask(READ, 0, 4096)
        c.request(STATUS, 0, MiB)  # what came before it is under way
        failed = []

        def run_list():
            with pytest.raises(QmpError) as e:
                d.client().cmd('transaction', actions=[
                    {'type': 'block-dirty-bitmap-add', 'data': {'node': 'n', 'name': 'b'}}])
            failed.append(str(e.value))
        t = threading.Thread(target=run_list)
        t.start()
        c.s.settimeout(0.3)
        with pytest.raises(TimeoutError):  # until the list has shut the gate
            while t.is_alive():
                c.request(STATUS, 0, MiB)
        c.s.settimeout(DEADLINE)
        answers = [c.reply().cookie, c.reply().cookie]
        t.join()
        assert failed and 'n' in failed[0]
        assert answers[1] == slow


@pytest.mark.skipif('build-' in os.environ.get('TIDEMARK_BUILD', ''), reason='sanitizers want memory')
def test_a_moment_without_memory_holds_up_no_list():
    """The daemon sends to a client that does not read, and cannot have a stack for that."""
    with Daemon(['--loops', '2']) as d:
        fill(d.add_disk('disk', 16 * MiB), 16 * MiB)
        d.export('disk')
        content(d.path('disk.raw'))
        for _ in range(3):
            c = Raw(d.nbd_path)
            c.go('disk')
            for i in range(40):
                c.ask(READ, i * 64 * KiB, 64 * KiB)
            c.ask(READ, 0, 4096)
            c.ask(READ, 0, 64 * KiB)
            with open(f'/proc/{d.proc.pid}/statm') as f:
                size = int(f.read().split()[0]) * 4096
            resource.prlimit(d.proc.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
            try:
                d.cmd('query-version')
            finally:
                resource.prlimit(d.proc.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            d.cmd('transaction', actions=[{'type': kind, 'data': {'node': 'disk', 'name': 'b'}} for kind in
                                          ('block-dirty-bitmap-add', 'block-dirty-bitmap-remove')])
            c.close()


def test_a_hard_end_beside_a_backup_of_the_same_node():
    """The export gives up its permissions, which takes a while, when the list comes."""
    with Daemon(['--loops', '2']) as d:
        d.add_disk('src', 4 * MiB)
        d.add_disk('dst', 4 * MiB)
        for i in range(40):
            d.export('src', f's{i}')
            c = Raw(d.nbd_path)
            c.go(f's{i}')
            c.request(READ, 0, 512)
            d.qmp.send({'execute': 'block-export-del', 'arguments': {'id': f'exp-s{i}', 'mode': 'hard'}})
            until_later = time.monotonic() + i % 40 * 5e-5
            while time.monotonic() < until_later:
                pass  # the moment is what is varied
            d.qmp.send({'execute': 'blockdev-backup', 'arguments': backup_args('src', 'dst', 'full', job_id='j')})
            assert 'return' in d.qmp.reply() and 'return' in d.qmp.reply()
            d.qmp.job_end('j')
            d.qmp.event('BLOCK_EXPORT_DELETED', id=f'exp-s{i}')
            c.close()
