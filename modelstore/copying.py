"""Copies in memory that leave the interpreter lock to other threads.

To assign to a slice holds it, also while the kernel makes the pages of new memory: half a second for each GiB, in which
the imports of a start stand still.
"""

from __future__ import annotations


def copy(target: memoryview, source: bytes | bytearray | memoryview) -> None:
    """Copy all bytes of `source` to the beginning of `target`. Raises ValueError if it is shorter."""
    import numpy as np  # what reads and seeds plain files has no other use for it

    if source:
        np.copyto(np.frombuffer(target, np.uint8, len(source)), np.frombuffer(source, np.uint8))
