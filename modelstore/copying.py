"""Copies in memory that leave the interpreter lock to other threads.

Python holds the lock while a slice is assigned, also while the kernel makes the pages of new memory. That takes half a
second for each GiB, in which the imports of a start would stand still.
"""

from __future__ import annotations


def copy_bytes(target: memoryview, source: bytes | bytearray | memoryview) -> None:
    """Copy all of `source` to the beginning of `target`; both are contiguous bytes. Raises ValueError if `target` is
    shorter."""
    import numpy as np  # it takes a while: a start on a GPU has this file before its read has begun

    if source:
        np.copyto(np.frombuffer(target, np.uint8, len(source)), np.frombuffer(source, np.uint8))
