"""Tensors that are views of a safetensors file in memory. Imports nothing but torch and the header's parser."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from modelstore.errors import BadSafetensors
from modelstore.volume.header import Header, TensorInfo

_TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):
    _TORCH["F8_E8M0"] = torch.float8_e8m0fnu


def dtype_of(tensor: TensorInfo, path: str) -> torch.dtype:
    """The dtype of a tensor of the file at `path`. Raises BadSafetensors if torch has no such dtype."""
    dtype = _TORCH.get(tensor.dtype)
    if dtype is None:
        raise BadSafetensors(f"{path} holds {tensor.dtype} tensors, which this version of torch does not know")
    return dtype


def view_of(memory: memoryview | mmap.mmap, header: Header, tensor: TensorInfo, path: str) -> torch.Tensor:
    """A tensor in the memory of its file; a copy if it does not lie as its dtype wants it."""
    dtype, begin = dtype_of(tensor, path), header.data_start + tensor.begin
    if tensor.size_bytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    buffer: Any = memory
    if begin % dtype.itemsize:
        buffer, begin = bytearray(memory[begin : begin + tensor.size_bytes]), 0
    flat = torch.frombuffer(buffer, dtype=dtype, count=tensor.size_bytes // dtype.itemsize, offset=begin)
    return flat.view(tensor.shape)
