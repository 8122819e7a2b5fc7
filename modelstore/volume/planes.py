"""Compressed weights, without loss: a block in byte planes, each compressed by zstd or stored as it is.

The exponents of trained weights are far from evenly spread, and their lowest bits carry no pattern. So the words of a
block are split into a plane of the bytes that hold the exponents, which compresses, and planes of the others, which
often do not and are stored as they are. A block's entry in the table of its file is

    [rotation, length, …]       the stored length of each of 1, 2 or 4 planes: its full length if it is not compressed

and its stored bytes are those of the planes, one after the other, and the block's last `length % 64` bytes. With

- one plane, this is all of the block;
- two, the block is two halves of 16-bit words, x and y; with z the byte-swapped words of y and the mask m, which is
  0xff00 rotated left by `rotation` bits, the first plane is (x & ~m) | (z & m), the second one (x & m) | (z & ~m);
- four, plane i has byte i of each 32-bit word.

`rotation` is 3 for float16 that was made from bfloat16: the lowest three bits of its words are zero, and with them in
the plane of the exponents, the other one needs no decoding. To split and to join words by halves is twice as fast in
numpy as by bytes (measured). All words are little-endian.

This file is also loaded by the reader process, and imports nothing of the package.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

Bytes = bytes | bytearray | memoryview
Entry = Sequence[int]

_UNIT = 64  # as in block_table.py, from which this file may not import
_CHUNK_BYTES = 128 << 10  # of one half: its words stay in the processor's cache between the passes
_LEAST_GAIN = 0.05  # of a block
_LEAST_PLANE_GAIN = 0.03
_DECODING = 0.05  # of a compressed byte, in bytes: what is nearly as small and is decoded faster is taken
_AS_GOOD = 1.01  # the first choice that is, because it is decoded faster
_SAMPLES = 32
_SAMPLE_BYTES = 1 << 10
_STRIDE = 0x9E3779B1  # of 2**32: spreads the samples over a step each; else they are of the same columns of a matrix

# Long matches only, found by a table of 64 entries: short ones in bytes without a pattern make the frames larger, and
# take twice as long to decode (measured).
_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=23, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0,
    strategy=zstandard.STRATEGY_FAST, write_content_size=True, write_checksum=False,
)  # fmt: skip
_codecs = threading.local()


def encode(block: Bytes) -> tuple[list[int], list[Bytes]]:
    """The entry of a block, and its stored bytes in parts; a block that gains under 5 % is stored as it is."""
    data = np.frombuffer(block, np.uint8)
    width, rotation = _best_split(data)
    entry, parts = [rotation], []
    for plane in _split(data, width, rotation):
        frame = _compressor().compress(plane.data)
        stored = frame if len(frame) < (1 - _LEAST_PLANE_GAIN) * plane.nbytes else plane.data
        entry.append(len(stored))
        parts.append(stored)
    parts.append(data[_even(data.nbytes) if width > 1 else data.nbytes :].data)
    if sum(map(len, parts)) > (1 - _LEAST_GAIN) * data.nbytes:
        return [0, data.nbytes], [data.data]
    return entry, parts


def decode(entry: Entry, stored: memoryview, target: memoryview) -> None:
    """Fill `target`, which is as long as the block, from its stored bytes. The entry was checked.

    Raises ValueError if the stored bytes are not those of such a block. No more memory is taken than for the block.
    """
    width, length = len(entry) - 1, len(target)
    even = _even(length) if width > 1 else length
    planes, position = [], 0
    for size in entry[1:]:
        part = stored[position : position + size]
        planes.append(_plane(part, even // width))
        position += size
    words = np.frombuffer(target, np.uint8)
    _join(planes, words[:even], entry[0])
    target[even:] = stored[position : position + length - even]


def _even(length: int) -> int:
    return length // _UNIT * _UNIT


def _compressor() -> Any:
    if not hasattr(_codecs, "compressor"):
        _codecs.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    return _codecs.compressor


def _plane(part: memoryview, size: int) -> npt.NDArray[np.uint8]:
    if len(part) == size:
        return np.frombuffer(part, np.uint8)
    if not hasattr(_codecs, "decompressor"):
        _codecs.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.get_frame_parameters(part).content_size != size:  # the memory that it would take
            raise ValueError("a plane has another length than its frame")
        return np.frombuffer(_codecs.decompressor.decompress(part), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"a plane cannot be decoded: {error}") from error


def _split(data: npt.NDArray[np.uint8], width: int, rotation: int) -> list[npt.NDArray[np.uint8]]:
    if width == 1:
        return [data]
    data = data[: _even(data.nbytes)]
    if width == 4:
        return [np.ascontiguousarray(data[byte::4]) for byte in range(4)]
    half = data.nbytes // 2
    low, high = np.empty(half, np.uint8), np.empty(half, np.uint8)
    for chunk in _chunks(half):
        x, y = data[:half][chunk], data[half:][chunk]
        _exchange(x.view("<u8"), _swapped(y).view("<u8"), low[chunk].view("<u8"), high[chunk].view("<u8"), rotation)
    return [low, high]


def _join(planes: Sequence[npt.NDArray[np.uint8]], target: npt.NDArray[np.uint8], rotation: int) -> None:
    if len(planes) == 1:
        target[...] = planes[0]
    elif len(planes) == 4:
        for byte, plane in enumerate(planes):
            target[byte::4] = plane
    else:
        half = target.nbytes // 2
        x, y = target[:half], target[half:]
        swapped = np.empty(min(half, _CHUNK_BYTES), np.uint8)
        for chunk in _chunks(half):
            low, high = planes[0][chunk], planes[1][chunk]
            z = swapped[: low.nbytes]
            _exchange(low.view("<u8"), high.view("<u8"), x[chunk].view("<u8"), z.view("<u8"), rotation)
            y[chunk].view(">u2")[...] = z.view("<u2")


def _chunks(length: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK_BYTES, length)) for start in range(0, length, _CHUNK_BYTES)]


def _swapped(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return data.view(">u2").astype("<u2").view(np.uint8)


def _exchange(
    x: npt.NDArray[Any], y: npt.NDArray[Any], new_x: npt.NDArray[Any], new_y: npt.NDArray[Any], rotation: int
) -> None:
    """Exchange the bits of the mask between words; to do it twice is to undo it."""
    word = (0xFF00 << rotation | 0xFF00 >> 16 - rotation) & 0xFFFF
    difference = np.bitwise_xor(x, y)
    np.bitwise_and(difference, np.uint64(word * 0x0001_0001_0001_0001), out=difference)
    np.bitwise_xor(x, difference, out=new_x)
    np.bitwise_xor(y, difference, out=new_y)


def _best_split(data: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """The number of planes and the rotation that make a block smallest, by the spread of the bytes in samples of it."""
    step = max(_even(data.nbytes // _SAMPLES), _UNIT)
    shifts = max(step - _SAMPLE_BYTES, _UNIT) // _UNIT
    starts = range(0, _even(data.nbytes), step)
    places = [start + _UNIT * (shifts * (number * _STRIDE % 2**32) >> 32) for number, start in enumerate(starts)]
    samples = [data[place : place + _SAMPLE_BYTES] for place in places]
    sample = np.concatenate([each[: _even(each.nbytes)] for each in samples] or [data])
    choices = [(1, 0)] if sample.nbytes < _UNIT else [(2, 3), (2, 0), (4, 0), (1, 0)]
    costs = [sum(map(_cost, _split(sample, *choice))) for choice in choices]
    least = min(costs)
    return next(choice for cost, choice in zip(costs, choices, strict=True) if cost <= _AS_GOOD * least)


def _cost(plane: npt.NDArray[np.uint8]) -> float:
    """The bytes of a plane once it is compressed, and what it takes to decode them."""
    shares = np.bincount(plane, minlength=256) / max(plane.nbytes, 1)
    shares = shares[shares > 0]
    ratio = float(-(shares * np.log2(shares)).sum()) / 8
    return plane.nbytes * (min(ratio + _DECODING, 1.0) if ratio < 1 - _LEAST_PLANE_GAIN else 1.0)
