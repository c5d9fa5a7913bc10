# SPDX-License-Identifier: Apache-2.0
"""What the system tests share: daemons of one test or of one module, and what build this is."""
import os

import pytest

import harness
from contract_tools import Sides
from harness import Daemon


def pytest_configure(config):
    program = os.path.join(harness.BIN, 'tidemarkd')
    if not os.access(program, os.X_OK):
        raise pytest.UsageError(f'{program} is not there: run ./run --build-only, or set TIDEMARK_BUILD')


@pytest.fixture(scope='session')
def sanitized():
    """True for a sanitizer build: it is slow and keeps freed memory, so figures mean nothing."""
    with open(os.path.join(harness.BIN, 'tidemarkd'), 'rb') as f:
        program = f.read()
    return b'__asan_init' in program or b'__tsan_init' in program


@pytest.fixture
def tide():
    """A daemon of this test's own."""
    with Daemon() as d:
        yield d


@pytest.fixture(scope='module')
def common():
    """One daemon for the tests of a module that leave nothing behind."""
    with Daemon() as d:
        yield d


@pytest.fixture
def qmp(common):
    """A fresh, negotiated client of the common daemon."""
    client = common.client()
    yield client
    client.close()


@pytest.fixture(scope='module')
def kept_sides():
    """[the daemons of the last test of this module], or nothing where it failed."""
    kept = []
    yield kept
    for s in kept:
        s.end()


@pytest.fixture
def sides(kept_sides, request):
    """Our daemon and the reference, with nothing on them. They outlive the test unless it fails."""
    s = kept_sides.pop() if kept_sides else Sides()
    failed = request.session.testsfailed
    yield s
    if request.session.testsfailed > failed:
        s.kill()
        return
    try:
        s.wipe()
    except BaseException:
        s.kill()
        raise
    kept_sides.append(s)
