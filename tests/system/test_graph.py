# SPDX-License-Identifier: Apache-2.0
"""Who may stand on whom, who may write where, and what ends with what."""
import fcntl
import os
import struct
import threading
import time

import pytest

from harness import Daemon, MiB, QmpError, qemu_io
from nbd_raw import Raw

NULL = {'driver': 'null-co', 'size': MiB}
F_OFD_GETLK = 36


def raw(d, node, below):
    d.cmd('blockdev-add', {'driver': 'raw', 'node-name': node, 'file': below})


def backup(d, source, target, job, sync='none'):
    d.cmd('blockdev-backup', {'device': source, 'target': target, 'sync': sync, 'job-id': job})


def test_source_and_target_may_not_share_a_file():
    """Old data kept for the target would overwrite what the guest has just written."""
    with Daemon() as d:
        d.add_file('f', MiB)
        raw(d, 's', 'f')
        raw(d, 't', 'f')
        uri = d.export('s')
        with pytest.raises(QmpError, match="'t'"):
            backup(d, 's', 't', 'j')
        qemu_io(uri, 'write -P 2 0 64k', 'read -P 2 0 64k')
        assert d.cmd('query-jobs') == []


def test_a_target_is_written_by_its_job_alone():
    with Daemon() as d:
        d.cmd('blockdev-add', {**NULL, 'node-name': 's'})
        d.add_file('tf', MiB)
        raw(d, 't', 'tf')
        backup(d, 's', 't', 'j')
        with pytest.raises(QmpError, match="block job 'j'"):
            d.export('tf')
        with pytest.raises(QmpError, match="block job 'j'"):
            backup(d, 's', 'tf', 'j2')
        with pytest.raises(QmpError, match="being written by block job 'j'"):
            d.cmd('blockdev-add', {**NULL, 'node-name': 'x'})
            backup(d, 't', 'x', 'j3')


def test_long_job_ids_are_told_apart():
    with Daemon() as d:
        d.cmd('blockdev-add', {**NULL, 'node-name': 's'})
        d.add_file('t', MiB)
        backup(d, 's', 't', 'a' * 160 + '1')
        with pytest.raises(QmpError, match='in use'):
            backup(d, 's', 't', 'a' * 160 + '2')


def test_a_bitmap_in_use_keeps_the_parent_of_its_node():
    with Daemon() as d:
        raw(d, 'p', {**NULL, 'node-name': 'c'})
        d.cmd('block-dirty-bitmap-add', node='c', name='b', disabled=True)
        d.cmd('blockdev-add', {**NULL, 'node-name': 'z'})
        d.cmd('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'z',
                                   'bitmaps': [{'node': 'c', 'name': 'b'}]})
        with pytest.raises(QmpError, match="bitmap 'b' on node 'c' is in use"):
            d.cmd('blockdev-del', node_name='p')


def test_a_child_that_outlived_its_parent_can_be_deleted():
    with Daemon() as d:
        raw(d, 'p', {**NULL, 'node-name': 'c'})
        d.cmd('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'c'})
        d.cmd('blockdev-del', node_name='p')
        d.cmd('block-export-del', id='e')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='e')
        d.cmd('blockdev-del', node_name='c')
        assert d.cmd('query-named-block-nodes') == []


def test_nodes_stand_at_most_64_deep():
    with Daemon() as d:
        d.cmd('blockdev-add', {**NULL, 'node-name': 'n0'})
        for i in range(1, 65):
            raw(d, f'n{i}', f'n{i - 1}')
        with pytest.raises(QmpError, match='64'):
            raw(d, 'n65', 'n64')
        qemu_io(d.export('n64'), 'write -P 9 0 64k', 'read 0 4k')
        d.cmd('block-dirty-bitmap-add', node='n64', name='b')


def test_a_pipe_is_refused_and_holds_up_nobody():
    with Daemon() as d:
        os.mkfifo(d.path('pipe'))
        with pytest.raises(QmpError, match='not a regular file'):
            d.cmd('blockdev-add', {'driver': 'file', 'node-name': 'f', 'filename': d.path('pipe'),
                                   'read-only': True})
        d.cmd('blockdev-add', {**NULL, 'node-name': 'n'})


def rounds(seconds):
    end = time.monotonic() + seconds
    n = 0
    while n < 20 or time.monotonic() < end:
        yield n
        n += 1


def test_a_writable_export_always_holds_its_lock():
    """One export gives its locks back while the next one takes them."""
    with Daemon() as d:
        path = d.add_disk('r', MiB)
        with open(path, 'r+b') as f:
            for n in rounds(2):
                d.export('r', 'a')
                client = Raw(d.nbd_path)
                client.go('a')
                d.cmd('block-export-del', id='exp-a', mode='hard')
                for _ in range(n % 40):
                    d.cmd('query-version')
                d.export('r', 'b')
                d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-a')
                lock = fcntl.fcntl(f, F_OFD_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 101, 1, 0))
                assert struct.unpack('hhqqi4x', lock)[0] != fcntl.F_UNLCK, f'round {n}: no write lock'
                d.cmd('block-export-del', id='exp-b')
                d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-b')


def test_a_node_stays_until_its_export_is_gone():
    with Daemon() as d:
        with open(d.path('x'), 'wb') as f:
            f.truncate(MiB)
        for _ in rounds(2):
            raw(d, 'r', {'driver': 'file', 'filename': d.path('x')})
            d.export('r', 'e')
            client = Raw(d.nbd_path)
            client.go('e')
            d.cmd('block-export-del', id='exp-e', mode='hard')
            while True:
                try:
                    d.cmd('blockdev-del', node_name='r')
                    break
                except QmpError as e:
                    assert 'in use' in e.desc


def test_query_block_while_exports_come_and_go():
    with Daemon() as d:
        d.add_file('f', MiB)
        stop, errors = [], []

        def ask():
            q = d.client()
            try:
                while not stop:
                    q.cmd('query-block')
            except Exception as e:  # noqa: whatever it was is the finding
                errors.append(e)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads:
            t.start()
        try:
            for _ in rounds(2):
                for i in range(3):
                    d.export('f', f'n{i}')
                for i in range(3):
                    d.cmd('block-export-del', id=f'exp-n{i}')
        finally:
            stop.append(True)
            for t in threads:
                t.join()
        assert not errors


def test_generation_changes_when_a_bitmap_forgets():
    with Daemon() as d:
        d.cmd('blockdev-add', {**NULL, 'node-name': 'n'})
        d.cmd('block-dirty-bitmap-add', node='n', name='b')
        seen = [d.bitmap('n', 'b')['generation']]

        def now_differs(name, **kw):
            d.cmd(name, node='n', name='b', **kw)
            g = d.bitmap('n', 'b')['generation']
            assert g not in seen
            seen.append(g)
        now_differs('block-dirty-bitmap-clear')
        now_differs('block-dirty-bitmap-disable')
        now_differs('block-dirty-bitmap-enable')
        with pytest.raises(QmpError):
            d.cmd('transaction', actions=[
                {'type': 'block-dirty-bitmap-clear', 'data': {'node': 'n', 'name': 'b'}},
                {'type': 'block-dirty-bitmap-disable', 'data': {'node': 'n', 'name': 'b'}},
                {'type': 'abort', 'data': {}}])
        assert d.bitmap('n', 'b')['generation'] == seen[-1]
        d.cmd('block-dirty-bitmap-remove', node='n', name='b')
        d.cmd('block-dirty-bitmap-add', node='n', name='b')
        assert d.bitmap('n', 'b')['generation'] not in seen
