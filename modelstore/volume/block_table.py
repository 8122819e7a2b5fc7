"""The table of a compressed file: where the stored bytes of each block lie, and whether an entry can be true.

An entry is described in `planes.py`. The stored bytes of the blocks follow each other, each rounded up to a multiple of
ALIGNMENT with zeros, so that a block is read with O_DIRECT, and a table that lies about an offset cannot be written.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Entry = Sequence[int]

ALIGNMENT = 4096
_UNIT = 64  # of the bytes that are split into planes; the rest of a block is stored as it is


def block_lengths(size_bytes: int, block_bytes: int) -> list[int]:
    """The lengths of the blocks of a file: all but the last are full."""
    full, rest = divmod(size_bytes, block_bytes)
    return [block_bytes] * full + ([rest] if rest else [])


def check_entry(entry: Entry, length: int) -> None:
    """Raise ValueError if no block of `length` bytes can have this entry."""
    planes = len(entry) - 1
    if planes not in (1, 2, 4) or not 0 <= entry[0] < 8 or (entry[0] and planes != 2):
        raise ValueError("a block has planes that this version does not know")
    most = (length if planes == 1 else length // _UNIT * _UNIT) // planes
    if not all(0 < size <= most for size in entry[1:]):
        raise ValueError("a plane is longer than its block, or empty")


def stored_length(entry: Entry, length: int) -> int:
    """The bytes that a block of `length` bytes takes on the volume."""
    rest = length % _UNIT if len(entry) > 2 else 0
    return -(-(sum(entry[1:]) + rest) // ALIGNMENT) * ALIGNMENT


def stored_ranges(table: Sequence[Entry], size_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of the stored bytes of each block."""
    offset = 0
    for entry, length in zip(table, block_lengths(size_bytes, block_bytes), strict=True):
        stored = stored_length(entry, length)
        yield offset, stored
        offset += stored
