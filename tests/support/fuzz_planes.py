"""Coverage-guided fuzzing of compressed blocks: `python -m tests.support.fuzz_planes CORPUS [libFuzzer options]`.

The input is a table's entry, two bytes for the block's length, and its stored bytes. An entry is refused with ValueError or
accounts for its block; decoding gives that many bytes or ValueError, in bounded memory; what is encoded comes back.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from itertools import pairwise

import atheris

with atheris.instrument_imports(include=["modelstore.volume.planes", "modelstore.volume.block_table"]):
    from modelstore.volume import planes
    from modelstore.volume.block_table import check_entry, stored_length, stored_ranges


def one(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    entry = [provider.ConsumeIntInRange(-1, 9)]
    entry += [provider.ConsumeIntInRange(-1, 1 << 14) for _plane in range(provider.ConsumeIntInRange(0, 5))]
    length = provider.ConsumeIntInRange(1, 1 << 14)
    stored = provider.ConsumeBytes(1 << 15)
    try:
        check_entry(entry, length)
    except ValueError:
        entry = []
    if entry:
        assert stored_length(entry, length) >= sum(entry[1:])
        table = [entry] * 3
        assert all(a[0] + a[1] == b[0] for a, b in pairwise(stored_ranges(table, 3 * length, length)))
        padded = stored.ljust(stored_length(entry, length), b"\0")
        target = memoryview(bytearray(length + 1))
        with suppress(ValueError):
            planes.decode(entry, memoryview(padded), target[:length])
        assert target[length] == 0
    block = stored[:length]
    if block:
        entry, parts = planes.encode(block)
        check_entry(entry, len(block))
        back = bytearray(len(block))
        planes.decode(entry, memoryview(b"".join(map(bytes, parts))), memoryview(back))
        assert back == block


MEMORY_BYTES = 2 << 30

if __name__ == "__main__":
    # libFuzzer's own limit reads the peak of the process, which Linux carries over from a parent that used more.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    atheris.Setup([*sys.argv, "-rss_limit_mb=0"], one)
    atheris.Fuzz()
