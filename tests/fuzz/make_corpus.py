#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the inputs that the fuzzer of the NBD server begins with, into tests/fuzz/corpus/fuzz_nbd.

Each is one byte that says where it begins (see tests/fuzz/fuzz_nbd.c) and what a client says from
there on: conversations that get far, and each kind of mistake; transmissions with a file below too. Run it after a change and commit what
it wrote; the same script writes the same files.
"""
import os
import shutil
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from nbd_raw import (CACHE, DF, DISC, FAST_ZERO, FLUSH, FUA, NO_HOLE, OPT_ABORT,  # noqa: E402
                     OPT_EXPORT_NAME, OPT_EXTENDED, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META, OPT_SET_META,
                     OPT_STARTTLS, OPT_STRUCTURED, PAYLOAD_LEN, READ, REQ_ONE, STATUS, TRIM, WRITE, ZERO,
                     ext_request, meta, option, request, string)

DISK, DATA = 16 << 20, 256 << 10  # DATA bytes of it are written, from DATA on, in a file
START, SIMPLE, STRUCTURED, STRUCTURED_OPTIONS, EXTENDED, EXTENDED_OPTIONS, ON_FILE = range(7)
FLAGS = struct.pack('>I', 3)
GO = string('n') + struct.pack('>HHHH', 3, 0, 1, 3)
CONTEXTS = ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:b']


def handshakes():
    yield 'go', START, FLAGS + option(OPT_GO, GO) + request(READ, 0, 512) + request(DISC)
    yield 'export-name', START, FLAGS + option(OPT_EXPORT_NAME, b'n') + request(READ, 1, 1)
    yield 'not-fixed', START, bytes(4) + option(OPT_EXPORT_NAME, b'n') + request(FLUSH)
    yield 'everything', START, FLAGS + b''.join([
        option(OPT_LIST), option(OPT_STARTTLS), option(OPT_INFO, GO), option(99, b'abc'), option(OPT_STRUCTURED),
        option(OPT_STRUCTURED), option(OPT_LIST_META, meta('n', [])), option(OPT_SET_META, meta('n', CONTEXTS)),
        option(OPT_EXTENDED), option(OPT_EXTENDED), option(OPT_STRUCTURED), option(OPT_GO, GO),
        ext_request(STATUS, 0, DISK)])
    yield 'abort', START, FLAGS + option(OPT_ABORT)
    yield 'garbage', START, b'GET / HTTP/1.1\r\n\r\n'
    for name, opt, data, length in (
            ('long-option', OPT_INFO, b'x' * 300, 0xffffffff), ('short-name', OPT_GO, b'\xff' * 6, None),
            ('no-count', OPT_SET_META, string('n'), None), ('many', OPT_LIST_META, string('n') + b'\xff' * 4, None),
            ('data', OPT_EXTENDED, b'x', None), ('other-export', OPT_SET_META, meta('m', CONTEXTS), None)):
        yield 'bad-' + name, START, FLAGS + option(opt, data, length) + option(OPT_GO, GO)
    for begin, name in ((STRUCTURED_OPTIONS, 'structured'), (EXTENDED_OPTIONS, 'extended')):
        for i, queries in enumerate(([], ['base:'], ['qemu:'], ['qemu:dirty-bitmap:'], CONTEXTS[:1], CONTEXTS)):
            data = meta('n', queries)
            make = ext_request if name == 'extended' else request
            yield f'{name}-meta-{i}', begin, option(OPT_LIST_META, data) + option(OPT_SET_META, data) + \
                option(OPT_GO, GO) + make(STATUS, 0, DISK) + make(STATUS, 4096, 1, REQ_ONE)
    yield 'extended-old', EXTENDED_OPTIONS, option(OPT_EXPORT_NAME, b'n')


def transmissions():
    ranges = [(0, 512), (1, 4096), (DISK - 1, 1), (DISK, 1), (0, DISK), (DISK - 512, 1024), (DATA - 9, DATA)]
    for begin, name, make in ((SIMPLE, 'simple', request), (STRUCTURED, 'structured', request),
                              (EXTENDED, 'extended', ext_request)):
        payload = PAYLOAD_LEN if begin == EXTENDED else 0
        write = make(WRITE, 5000, 100, FUA | payload) + b'w' * 100
        for cmd, word, flags in ((READ, 'read', 0), (READ, 'read-df', DF), (TRIM, 'trim', FUA), (CACHE, 'cache', 0),
                                 (ZERO, 'zero', NO_HOLE), (ZERO, 'fast-zero', FAST_ZERO), (FLUSH, 'flush', 0),
                                 (STATUS, 'status', 0), (STATUS, 'status-one', REQ_ONE)):
            yield f'{name}-{word}', begin, write + b''.join(make(cmd, o, n, flags, i) for i, (o, n) in enumerate(ranges))
        yield name + '-writes', begin, b''.join(
            make(WRITE, o, n, payload) + b'd' * n for o, n in ((0, 1), (7, 512), (4096, 4096), (DISK - 1, 2), (0, 0)))
        yield name + '-write-huge', begin, make(WRITE, 0, (32 << 20) + 1, payload) + b'x' * 64
        yield name + '-write-cut', begin, make(WRITE, 0, 100_000, payload) + b'x' * 99
        yield name + '-unknown', begin, make(99, 1, 2, 0xffff) + make(READ, 0, 1, 0x8000) + make(DISC)
        yield name + '-overflow', begin, b''.join(
            make(c, o, 0xffffffff) for c in (READ, TRIM, CACHE, ZERO, STATUS) for o in ((1 << 64) - 1, 1 << 63))
    yield 'wrong-magic', EXTENDED, request(READ, 0, 512)
    yield 'extended-filter', EXTENDED, b''.join(
        ext_request(STATUS, 0, 8 + 4 * len(ids), PAYLOAD_LEN | flags) + struct.pack(f'>Q{len(ids)}I', n, *ids)
        for ids, n, flags in (([0], DISK, 0), ([2, 0], DISK, 0), ([0, 1, 2], 4096, REQ_ONE), ([2, 2], 1, 0), ([9], 1, 0),
                              ([], 1, 0), ([1], (1 << 64) - 1, 0), ([1], 0, 0), ([0, 1, 2, 0], 5, 0)))
    yield 'extended-unwanted', EXTENDED, b''.join(
        ext_request(c, 0, n, PAYLOAD_LEN) + b'p' * n for c in (READ, TRIM, FLUSH, STATUS, 99) for n in (1, 32, 1000))
    yield 'extended-wide', EXTENDED, b''.join(
        ext_request(c, o, n) for c in (READ, TRIM, CACHE, ZERO, STATUS) for o, n in (
            (0, 1 << 32), (0, (1 << 64) - 1), (1, (1 << 64) - 1), (1 << 63, 1 << 63), (DISK, 0)))
    yield 'extended-lost', EXTENDED, ext_request(WRITE, 0, 512) + bytes(512)
    yield 'extended-past', EXTENDED, ext_request(TRIM, 0, 1 << 40, PAYLOAD_LEN) + bytes(64)


def main():
    out = os.path.join(HERE, 'corpus', 'fuzz_nbd')
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    on_file = [('file-' + name, ON_FILE + begin, data) for name, begin, data in transmissions()]
    for name, begin, data in [*handshakes(), *transmissions(), *on_file]:
        with open(os.path.join(out, name), 'xb') as f:
            f.write(bytes([begin]) + data)


if __name__ == '__main__':
    main()
