"""The header of a safetensors file: parsed strictly, written deterministically. Standard library only.

    8 bytes        N, the header's length, little-endian
    N bytes        JSON: {"__metadata__": {str: str}, "<tensor>": {"dtype", "shape", "data_offsets": [begin, end]}}
    the rest       the tensors' bytes, without gaps

At least all that the reference implementation refuses is refused here (its rules: format README and `tensor.rs` of
huggingface/safetensors), because a file that lies must not be published, however it would be opened later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from modelstore.errors import BadSafetensors

MAX_HEADER_BYTES: Final = 100_000_000
LENGTH_BYTES: Final = 8
_ALIGNMENT = 8
_MAX_COUNT = 2**64 - 1

DTYPE_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `begin` and `end` in bytes from the start of the data, in C order and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors by their place in the file; `data_start` in bytes from the start of the file."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


def header_length(prefix: bytes, *, file_bytes: int, where: str) -> int:
    """The header's length from the file's first 8 bytes, checked against the file's size."""
    if len(prefix) < LENGTH_BYTES:
        raise _bad(where, "it is too short for a header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(where, f"its header claims {length} bytes, over the limit of {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise _bad(where, f"its header claims {length} bytes, the file has {file_bytes}")
    return length


def parse_header(data: bytes | memoryview, *, file_bytes: int, where: str) -> Header:
    """Parse the JSON part of a header (without the 8 bytes) of a file of `file_bytes`; `where` names it in errors."""
    data_start = LENGTH_BYTES + len(data)
    try:
        text = bytes(data).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("it does not begin with '{'")
        parse_int = _no_negative_zero if "-0" in text else None  # the hook is called for every number
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=parse_int)
        json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate is JSON here, and in no other language
    except (ValueError, RecursionError) as error:
        raise _bad(where, f"its header is not JSON as the format wants it ({error})") from error
    metadata = record.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(where, "its __metadata__ is not a map of strings")
    tensors = sorted(
        (_tensor(name, fields, where) for name, fields in record.items()), key=lambda t: (t.begin, t.end, t.name)
    )
    _check_offsets(tensors, file_bytes - data_start, where)
    return Header(tuple(tensors), metadata, data_start)


def encode_header(tensors: tuple[TensorInfo, ...], metadata: Mapping[str, str]) -> bytes:
    """The header's bytes with the 8 bytes before it; equal arguments give equal bytes, data begins 8-aligned."""
    record: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for tensor in tensors:
        record[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _tensor(name: str, fields: object, where: str) -> TensorInfo:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(where, f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(where, f"tensor {name[:80]!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise _bad(where, f"tensor {name[:80]!r} has a shape that is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise _bad(where, f"tensor {name[:80]!r} has offsets that are not two positions")
    bits = _product(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if bits > _MAX_COUNT or bits % 8 or end - begin != bits // 8:
        raise _bad(where, f"tensor {name[:80]!r} has {end - begin} bytes, its shape and dtype need {bits / 8:g}")
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _product(shape: list[int]) -> int:
    """The number of elements; as the reference does, a product that passes 64 bits on the way counts as too large."""
    count = 1
    for size in shape:
        count *= size
        if count > _MAX_COUNT:
            return _MAX_COUNT + 1
    return count


def _check_offsets(tensors: list[TensorInfo], data_bytes: int, where: str) -> None:
    if tensors and tensors[0].begin != 0:
        raise _bad(where, "its first tensor does not begin at 0")
    for before, after in pairwise(tensors):
        if after.begin != before.end:
            raise _bad(where, f"tensors {before.name[:80]!r} and {after.name[:80]!r} overlap or leave a gap")
    described = tensors[-1].end if tensors else 0
    if described != data_bytes:
        raise _bad(where, f"its header describes {described} bytes of tensors, the file has {data_bytes}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice")
    return record


def _no_negative_zero(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no count")  # the format's own reader takes it for a fraction
    return int(text)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _bad(where: str, problem: str) -> BadSafetensors:
    return BadSafetensors(f"{where} is not a valid safetensors file: {problem}")
