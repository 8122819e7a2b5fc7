"""A safetensors file in the storage dtype, tensor by tensor, with numpy alone.

`storage_policy.py` says which tensors are converted. They are rounded as torch rounds (to nearest, ties to even), so
casting the others at load time gives the same bits as loading the original. A weight that float16 cannot hold stops the
conversion and is named.

Equal input gives equal bytes: the order is fixed, the header canonical. At most a chunk of one tensor is in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelstore.copying import copy_bytes
from modelstore.dtypes import DTYPES, Dtype
from modelstore.errors import BadSafetensors, WeightOverflow
from modelstore.fill.storage_policy import CONVERTED, StoragePolicy
from modelstore.fill.stored_file import StoredFile
from modelstore.units import first_names
from modelstore.volume import durable
from modelstore.volume.content import read_content
from modelstore.volume.header import (
    DTYPE_BITS,
    LENGTH_BYTES,
    Header,
    TensorInfo,
    encode_header,
    header_length,
    parse_header,
)
from modelstore.volume.manifest import FileRecord

# Returns once the bytes of the source at an offset, so many of them, are there; raises if the work has to stop.
Ready = Callable[[int, int], None]

CHUNK_BYTES = 8 << 20
_MOST_NAMED = 5


def config_in_dtype(data: bytes, dtype: Dtype) -> bytes:
    """A `config.json` that names the storage dtype, as `save_pretrained` after a cast would write it."""
    config = json.loads(data)
    _set_dtype(config, dtype)
    return json.dumps(config, indent=2).encode() + b"\n"


def _set_dtype(config: dict[str, Any], dtype: Dtype) -> None:
    for name in ("dtype", "torch_dtype"):
        if isinstance(config.get(name), str):
            config[name] = dtype
    for name, value in config.items():
        if name.endswith("_config") and name != "quantization_config" and isinstance(value, dict):
            _set_dtype(value, dtype)


def read_header(
    path: Path, *, where: str, content: FileRecord | None = None, ready: Ready = lambda _offset, _length: None
) -> Header:
    """The checked header of a safetensors file; `where` names it in errors. `content`: what the file at `path` holds,
    if it may be compressed. `ready` is called before each read of it."""
    with durable.opened(path) as fd:
        content = content or FileRecord(path.name, os.fstat(fd).st_size, "", "")
        size = content.size_bytes
        ready(0, min(LENGTH_BYTES, size))
        length = header_length(read_content(fd, content, LENGTH_BYTES, 0), file_bytes=size, where=where)
        ready(LENGTH_BYTES, length)
        return parse_header(read_content(fd, content, length, LENGTH_BYTES), file_bytes=size, where=where)


def converted_tensors(header: Header, policy: StoragePolicy) -> tuple[TensorInfo, ...]:
    """The tensors as they will be stored; `header.tensors` itself if nothing is converted.

    Wider dtypes go first and the file's order decides among equals: every tensor then begins at a multiple of its
    element size, which safetensors' own loader needs.
    """
    if all(policy.stored_dtype(tensor) == tensor.dtype for tensor in header.tensors):
        return header.tensors
    tensors, position = [], 0
    for tensor in sorted(header.tensors, key=lambda t: -DTYPE_BITS[policy.stored_dtype(t)]):
        dtype = policy.stored_dtype(tensor)
        size = tensor.size_bytes
        if dtype != tensor.dtype:
            size = size * DTYPE_BITS[dtype] // DTYPE_BITS[tensor.dtype]
        tensors.append(TensorInfo(tensor.name, dtype, tensor.shape, position, position + size))
        position += size
    return tuple(tensors)


def converted_bytes(header: Header, policy: StoragePolicy) -> int:
    """The size of the file that `convert_file` makes."""
    tensors = converted_tensors(header, policy)
    return len(encode_header(tensors, header.metadata)) + max((tensor.end for tensor in tensors), default=0)


def convert_file(
    source: Path,
    target: StoredFile,
    header: Header,
    policy: StoragePolicy,
    *,
    ready: Ready,
    memory: memoryview | None = None,
) -> None:
    """Write `source`, whose header is `header`, to `target` as `policy` stores it.

    `ready` is called before each read. `memory`: of at least `converted_bytes`; what is written goes there, too. Raises
    WeightOverflow with every tensor of the file that does not fit.
    """
    tensors = converted_tensors(header, policy)
    overflowing: list[str] = []
    with durable.opened(source) as source_fd:
        write = _Writer(target, memory)
        write(encode_header(tensors, header.metadata))
        originals = {tensor.name: tensor for tensor in header.tensors}
        for after in tensors:
            before = originals[after.name]
            for chunk in _chunks(source_fd, before, header.data_start, source, ready):
                cast, fits = _cast(chunk, before.dtype, after.dtype)
                if not fits and before.name not in overflowing:
                    overflowing.append(before.name)
                write(cast.data.cast("B"))
        if overflowing:
            raise _overflow(policy.dtype, source.name, overflowing)


def copy_file(
    source: Path, size_bytes: int, target: StoredFile, *, ready: Ready, memory: memoryview | None = None
) -> None:
    """Write the `size_bytes` of `source` to `target` as they are; for the other arguments see `convert_file`."""
    with durable.opened(source) as fd:
        write = _Writer(target, memory)
        for offset in range(0, size_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size_bytes - offset)
            ready(offset, length)
            write(_read(fd, length, offset, source))


class _Writer:
    """Writes to a file, and to memory if there is some."""

    def __init__(self, target: StoredFile, memory: memoryview | None) -> None:
        self._target = target
        self._memory = memory
        self._position = 0

    def __call__(self, data: bytes | bytearray | memoryview) -> None:
        self._target.write(data)
        if self._memory is not None:
            copy_bytes(self._memory[self._position :], data)
        self._position += len(data)


def _overflow(dtype: Dtype, file: str, names: list[str]) -> WeightOverflow:
    wider = DTYPES[dtype].falls_back_to
    shown = first_names(names, _MOST_NAMED)
    verb = "goes" if len(names) == 1 else "go"
    return WeightOverflow(
        f"{dtype} ends at {DTYPES[dtype].largest} and {shown} in {file} {verb} beyond it",
        f"nothing was published; store {wider} (MODEL_DTYPE={wider}, --dtype {wider}), or seed it with "
        f"--overflow {wider}",
        tensors=tuple(names),
    )


def _chunks(fd: int, tensor: TensorInfo, data_start: int, path: Path, ready: Ready) -> Iterator[npt.NDArray[Any]]:
    """A tensor's bytes as little-endian words of its width, a chunk at a time."""
    width = DTYPE_BITS[tensor.dtype] // 8 if tensor.dtype in CONVERTED else 1
    word = np.dtype(f"<u{width}")
    position, end = data_start + tensor.begin, data_start + tensor.end
    while position < end:
        length = min(CHUNK_BYTES, end - position)
        ready(position, length)
        yield np.frombuffer(_read(fd, length, position, path), word)
        position += length


def _read(fd: int, length: int, offset: int, path: Path) -> bytes | bytearray:
    """So many bytes: one call may return fewer on a network file system."""
    data: bytes | bytearray = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    data = bytearray(data)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise BadSafetensors(f"{path.name} ended before its last tensor: seed it again")
        data += more
    return data


def _cast(words: npt.NDArray[Any], before: str, after: str) -> tuple[npt.NDArray[Any], bool]:
    """`words` of dtype `before` as dtype `after`, and whether every finite value stayed finite."""
    if before == after:
        return words, True
    wide = _as_float32(words, before)
    if after == "F32":
        return wide, True
    if after == "BF16":
        return _round_to_bfloat16(wide), True
    try:
        # The only exception that numpy raises here is the one that matters: a finite value became infinite.
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            return wide.astype("<f2"), True
    except FloatingPointError:
        return np.zeros(wide.shape, "<f2"), False


def _as_float32(words: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype == "F32":
        return words.view("<f4")
    if dtype == "F16":
        return words.view("<f2").astype("<f4")
    wide: npt.NDArray[Any] = np.left_shift(words, 16, dtype=np.uint32).view("<f4")
    return wide


def _round_to_bfloat16(wide: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Round to nearest, ties to even, in integers; a NaN becomes torch's NaN."""
    bits = wide.view(np.uint32)
    rounded: npt.NDArray[Any] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    rounded[np.isnan(wide)] = 0x7FC0
    return rounded
