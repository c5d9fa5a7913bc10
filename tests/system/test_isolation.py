# SPDX-License-Identifier: Apache-2.0
"""Law L5 with threads: writers on every disk, on loops of their own, beside a long run of lists.

The recording of all disks is handed from one set of bitmaps to the next by a list, thousands of times;
in between lists clear, remove and replace the bitmap that is recording, and fail. Every granule is
written once. Afterwards each write is in exactly one bitmap, and in one that was recording between its
beginning and its end; and writes of one client that came one after the other are in rising order, also
when they went to different disks: a list is one point in time for all of them.
"""
import itertools
import threading

import nbd
import pytest

from harness import DEADLINE, GiB, KiB, QmpError

G = 4 * KiB
DISKS = ['d0', 'd1', 'd2']
WRITERS = 2  # with several requests in flight, for each disk
QUOTA = 24  # writes of a writer in one epoch; then it waits until the next list is sent
BITMAP = 'block-dirty-bitmap-'


def act(kind, /, **data):
    return {'type': kind if kind == 'abort' else BITMAP + kind, 'data': data}


class Story:
    """Which epochs there were, and what the writers did: (disk, granule) -> (first, last) possible."""

    def __init__(self):
        self.sent = self.done = 0  # the newest epoch that may, that must have begun
        self.lock, self.turn = threading.Lock(), threading.Condition()
        self.written, self.found, self.in_order = {}, {}, []
        self.stop, self.failures = threading.Event(), []

    def begin(self, epoch):
        """The list that begins this epoch is about to be sent: everybody writes again."""
        with self.turn:
            self.sent = epoch
            self.turn.notify_all()

    def end(self):
        self.stop.set()
        self.begin(self.sent + 1)

    def wait_for_list(self, seen):
        with self.turn:
            assert self.turn.wait_for(lambda: self.sent != seen or self.stop.is_set(), DEADLINE)

    def harvest(self, disk, epoch, ranges):
        for offset, length in ranges:
            for g in range(offset // G, (offset + length) // G):
                assert (disk, g) not in self.found, f'{disk}: granule {g} is in two bitmaps'
                self.found[disk, g] = epoch


class Writer(threading.Thread):
    def __init__(self, story, work):
        super().__init__(daemon=True)
        self.story, self.work = story, work
        self.start()

    def run(self):
        try:
            self.work(self.story)
        except BaseException as e:
            self.story.failures.append(e)


def write_deep(uri, disk, first, step, depth=4):
    """Granules first, first + step, ... with several requests in flight."""
    def work(story):
        h = nbd.NBD()
        h.connect_uri(uri)
        data = nbd.Buffer.from_bytearray(bytearray(G))

        def ended(granule, since):
            def note(error):
                assert error.value == 0
                with story.lock:
                    story.written[disk, granule] = (since, story.sent)
                return 1
            return note
        for n, granule in enumerate(itertools.count(first, step)):
            while h.aio_in_flight() >= depth:
                h.poll(-1)
            if n % QUOTA == QUOTA - 1:
                while h.aio_in_flight():
                    h.poll(-1)
                story.wait_for_list(story.sent)
            if story.stop.is_set():
                break
            h.aio_pwrite(data, granule * G, completion=ended(granule, story.done))
        while h.aio_in_flight():
            h.poll(-1)
        h.shutdown()
    return work


def write_in_turn(uris, first, step):
    """One write after the other, each on another disk."""
    def work(story):
        handles = []
        for uri in uris:
            handles.append(nbd.NBD())
            handles[-1].connect_uri(uri)
        for n, granule in enumerate(itertools.count(first, step)):
            if n % QUOTA == QUOTA - 1:
                story.wait_for_list(story.sent)
            for disk, h in zip(DISKS, handles):
                since = story.done
                h.pwrite(bytes(G), granule * G)
                with story.lock:
                    story.written[disk, granule] = (since, story.sent)
                story.in_order.append((disk, granule))
            if story.stop.is_set():
                break
        for h in handles:
            h.shutdown()
    return work


def begin(d):
    """The disks, a bitmap b0 on each, and the writers."""
    story, step, uris = Story(), WRITERS + 1, {}
    for i, (disk, n) in enumerate(itertools.product(DISKS, range(step))):
        if n == 0:
            d.cmd('blockdev-add', driver='null-co', node_name=disk, size=256 * GiB)
            d.cmd(BITMAP + 'add', node=disk, name='b0', granularity=G)
        d.cmd('object-add', qom_type='iothread', id=f'io{i}')
        uris[disk, n] = d.export(disk, f'{disk}-{n}', iothread=f'io{i}')
    threads = [Writer(story, write_deep(uris[disk, n], disk, n, step)) for disk in DISKS for n in range(WRITERS)]
    threads.append(Writer(story, write_in_turn([uris[disk, WRITERS] for disk in DISKS], WRITERS, step)))
    return story, threads


def hand_over(d, story, epoch):
    """The recording of all disks goes from b{epoch} to b{epoch + 1}, in one of the ways that lose nothing."""
    old, new = f'b{epoch}', f'b{epoch + 1}'
    ways = [lambda n: [act('disable', node=n, name=old), act('add', node=n, name=new, granularity=G)],
            lambda n: [act('add', node=n, name=new, granularity=G), act('disable', node=n, name=old)],
            # the contents move to another bitmap, the recording goes on in this one under a new name
            lambda n: [act('copy', node=n, name='copy', bitmaps=[old], disabled=True), act('clear', node=n, name=old),
                       act('rename', node=n, name=old, **{'new-name': new}),
                       act('rename', node=n, name='copy', **{'new-name': old})]]
    story.begin(epoch + 1)
    d.cmd('transaction', actions=[a for n in DISKS for a in ways[epoch % len(ways)](n)])
    story.done = epoch + 1


def fail(d, epoch):
    """Everything is done to the bitmaps that record, and undone."""
    now = f'b{epoch}'
    actions = []
    for n in DISKS:
        actions += [act('clear', node=n, name=now), act('disable', node=n, name=now),
                    act('add', node=n, name='x'), act('merge', node=n, target=now, bitmaps=['x']),
                    act('remove', node=n, name=now), act('rename', node=n, name='x', **{'new-name': now})]
    with pytest.raises(QmpError):
        d.cmd('transaction', actions=[*actions, act('abort')])


def check(story):
    assert set(story.found) == set(story.written), 'a write is in no bitmap, or one that was not written is in one'
    for key, (first, last) in story.written.items():
        assert first <= story.found[key] <= last, (key, first, story.found[key], last)
    epochs = [story.found[key] for key in story.in_order]
    assert epochs == sorted(epochs)


def test_every_write_is_in_exactly_its_bitmap(tide, sanitized):
    n = 500 if sanitized else 1000
    story, threads = begin(tide)
    for epoch in range(n):
        fail(tide, epoch)
        hand_over(tide, story, epoch)
        if epoch % 2:
            fail(tide, epoch + 1)
        for disk in DISKS:
            story.harvest(disk, epoch, tide.ranges(disk, f'b{epoch}'))
            tide.cmd(BITMAP + 'remove', node=disk, name=f'b{epoch}')
    story.end()
    for t in threads:
        t.join(DEADLINE)
    assert story.failures == [] and not any(t.is_alive() for t in threads)
    for disk in DISKS:
        story.harvest(disk, n, tide.ranges(disk, f'b{n}'))
    assert len(story.written) > n and len(set(story.found.values())) > n / 4, 'the writers were at work'
    check(story)
