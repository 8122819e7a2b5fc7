"""How the tensors of a checkpoint are stored: which are converted to the storage dtype, and which stay as they come.

Converted: F32, F16 and BF16 tensors. Not converted: integers, booleans, 8-bit floats and F64; everything of a quantized
checkpoint, however it says that it is one; everything of a type that this version does not know well enough; weights
that transformers keeps in float32; and tensors that overflow and that no class loads, such as masks of old checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelstore import model_types
from modelstore.dtypes import DTYPES, Dtype
from modelstore.volume.header import DTYPE_BITS, TensorInfo

CONVERTED = frozenset({"F16", "BF16", "F32"})  # of a source; tensors in other dtypes are stored as they come
QUANTIZATION_FILES = frozenset(
    {"hf_quant_config.json", "quant_config.json", "quantization_config.json", "quantize_config.json", "params.json"}
)
_QUANTIZATION_KEY = re.compile(r"quantization|quantization_(config|args)|compression_config|quant_config")
_QUANTIZED_NAME = re.compile(
    r"(^|\.)(qweight|qzeros|scales|g_idx|codes|W_q|absmax|input_scale|weight_(packed|scale\w*|shape)|\w+_(blocks|scales)|"
    r"quant_(map|state.*))$"
)
_INTEGER = re.compile(r"[IU](8|16|32|64)")
_INTEGER_BUFFER = re.compile(r"(^|[._])(masked_bias|bias|mask|ids?|index|indices|positions?)$|mask")


@dataclass(frozen=True, slots=True)
class StoragePolicy:
    """How one checkpoint's tensors are stored.

    `unchanged_because` is set if none of them is converted; `types`: the model types in its config; `unloaded`: tensors
    that overflowed and that no class loads.
    """

    dtype: Dtype
    keep: re.Pattern[str] | None = None
    unchanged_because: str = ""
    types: frozenset[str] = frozenset()
    unloaded: frozenset[str] = frozenset()

    def stored_dtype(self, tensor: TensorInfo) -> str:
        """The safetensors dtype that `tensor` is stored in."""
        if self.unchanged_because or tensor.dtype not in CONVERTED:
            return tensor.dtype
        if self.keep is not None and self.keep.search(tensor.name):
            return tensor.dtype
        if tensor.name in self.unloaded:
            return tensor.dtype
        return DTYPES[self.dtype].safetensors

    def without(self, overflowing: Iterable[str]) -> StoragePolicy | None:
        """The policy that stores these tensors as they come, if no class loads any of them; else None."""
        names = frozenset(overflowing)
        is_unloaded = all(model_types.is_unloaded(name, self.types) for name in names)
        return replace(self, unloaded=self.unloaded | names) if is_unloaded else None

    def for_names(self, names: Iterable[str]) -> StoragePolicy:
        """The policy once the names of the checkpoint's tensors are known, as an index lists them."""
        if self.unchanged_because:
            return self
        name = next(filter(_QUANTIZED_NAME.search, names), "")
        return replace(self, unchanged_because=f"quantized checkpoint (it has {name[:80]})" if name else "")

    def for_tensors(self, tensors: Iterable[TensorInfo]) -> StoragePolicy:
        """The policy once the headers of the checkpoint are known."""
        if self.unchanged_because:
            return self
        reason = next(filter(None, map(_quantized, tensors)), "")
        return replace(self, unchanged_because=reason)


def storage_policy(
    dtype: Dtype, config: Mapping[str, Any] | None, others: Mapping[str, Mapping[str, Any]] | None = None
) -> StoragePolicy:
    """The policy for a checkpoint with this `config.json`, None if there is none; `others`: the files of
    QUANTIZATION_FILES beside it."""
    config = config or {}
    if dtype == "keep":
        return StoragePolicy(dtype, unchanged_because="asked for")
    if stated := _stated_quantization(config, others or {}):
        return StoragePolicy(dtype, unchanged_because=stated)
    types = frozenset(model_types.model_types(config))
    for name in sorted(types):
        reason = ""
        if not model_types.is_known(name):
            reason = f"model_type {name!r} is not known to this version, nor the weights that it keeps in fp32"
        elif why := model_types.unbuildable(name):
            reason = f"the weights that model_type {name!r} keeps in fp32 are not known to this version ({why})"
        if reason:
            return StoragePolicy(dtype, unchanged_because=reason)
    if not types and (part := config.get("_class_name")):  # a part of a diffusers pipeline
        return _policy_of_part(dtype, str(part))
    patterns: set[str] = set()
    if dtype in ("float16", "bfloat16"):
        patterns = model_types.kept_patterns(types, float16=dtype == "float16")
    return StoragePolicy(dtype, keep=_pattern(patterns), types=types)


def _policy_of_part(dtype: Dtype, class_name: str) -> StoragePolicy:
    kept = model_types.kept_parts(class_name)
    if kept is None:
        reason = f"the class {class_name!r} is not known to this version, nor the weights that it keeps in fp32"
        return StoragePolicy(dtype, unchanged_because=reason)
    if dtype == "float32" or not kept:
        return StoragePolicy(dtype)
    return StoragePolicy(dtype, keep=re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, kept))})(?:\.|$)"))


def _pattern(patterns: set[str]) -> re.Pattern[str] | None:
    if not patterns:
        return None
    return re.compile("|".join(".*".join(map(re.escape, p.split("*"))) for p in sorted(patterns)))


def _stated_quantization(config: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a checkpoint is quantized, as its files say; empty if none of them does."""
    if _has_quantization_key(config):
        return "quantized checkpoint"
    for name, record in sorted(others.items()):
        if name != "params.json" or _has_quantization_key(record):  # Mistral's config; the others say nothing else
            return f"quantized checkpoint ({name})"
    return ""


def _has_quantization_key(value: object) -> bool:
    """Whether a config states a quantization, at any depth."""
    if isinstance(value, Mapping):
        return any(
            (_QUANTIZATION_KEY.fullmatch(str(key)) and bool(inner)) or _has_quantization_key(inner)
            for key, inner in value.items()
        )
    return isinstance(value, list) and any(map(_has_quantization_key, value))


def _quantized(tensor: TensorInfo) -> str:
    """Why a tensor shows that its checkpoint is quantized; empty if it does not."""
    is_integer = _INTEGER.fullmatch(tensor.dtype) is not None and not _INTEGER_BUFFER.search(tensor.name)
    is_packed = is_integer and (len(tensor.shape) > 1 or "weight" in tensor.name)
    is_small_float = tensor.dtype.startswith("F") and DTYPE_BITS[tensor.dtype] <= 8
    if is_packed or is_small_float or _QUANTIZED_NAME.search(tensor.name):
        return f"quantized checkpoint ({tensor.name[:80]} is {tensor.dtype})"
    return ""
