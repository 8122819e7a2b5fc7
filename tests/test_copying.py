"""Copies in memory that leave the interpreter lock."""

from __future__ import annotations

import threading
import time

import pytest

from modelstore.copying import copy


def test_other_threads_run_while_bytes_are_copied() -> None:
    source, target = bytes(1 << 28), memoryview(bytearray(1 << 28))
    copying = threading.Thread(target=copy, args=(target, source))
    turns = 0
    copying.start()
    while copying.is_alive():
        time.sleep(0.0001)
        turns += 1
    assert turns > 20  # two or three if the copy keeps the lock


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_beginning_of_the_target_gets_the_bytes(kind: type) -> None:
    target = bytearray(b"......")
    copy(memoryview(target), kind(b"abc"))
    copy(memoryview(target), kind(b""))
    assert target == b"abc..."


def test_a_target_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError):
        copy(memoryview(bytearray(2)), b"abc")
