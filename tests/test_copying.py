"""Copies in memory that leave the interpreter lock."""

from __future__ import annotations

import threading
import time

import pytest

from modelstore.copying import copy_bytes


def test_other_threads_run_while_bytes_are_copied() -> None:
    source, target = bytes(1 << 28), memoryview(bytearray(1 << 28))
    copy_bytes(target, b"to import what it needs")
    turns = []
    for _try in range(3):  # this machine may be busy
        copying = threading.Thread(target=copy_bytes, args=(target, source))
        copying.start()
        turns.append(0)
        while copying.is_alive():
            time.sleep(0.0001)
            turns[-1] += 1
    assert max(turns) > 10  # one or two if the copy holds the lock


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_beginning_of_the_target_gets_the_bytes(kind: type) -> None:
    target = bytearray(b"......")
    copy_bytes(memoryview(target), kind(b"abc"))
    copy_bytes(memoryview(target), kind(b""))
    assert target == b"abc..."


def test_a_target_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError):
        copy_bytes(memoryview(bytearray(2)), b"abc")
