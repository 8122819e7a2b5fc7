"""The storage dtypes, in one table that everything else reads.

A new dtype is a line here, its cast in `fill/convert.py`, and an entry in `scripts/dev/model_types.py` for the modules
that transformers keeps in fp32 beside it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from modelstore.errors import InvalidSetting

Dtype = Literal["float16", "bfloat16", "float32", "keep"]
Overflow = Literal["stop", "bfloat16"]
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)
DEFAULT_DTYPE: Dtype = "float16"


@dataclass(frozen=True, slots=True)
class StorageDtype:
    """One storage dtype. `keep` stores the weights as they come, so it has neither a width nor a safetensors name.

    `safetensors`: its name in a safetensors header; `width_bytes`: of an element; `short_names`: other names that
    people write for it; `largest`: the largest finite value, as an error shows it; `falls_back_to`: the dtype that may
    be stored instead if a weight does not fit; `file_variant`: the infix of files that a pipeline's authors publish in
    this dtype.
    """

    name: Dtype
    safetensors: str = ""
    width_bytes: int = 0
    short_names: tuple[str, ...] = ()
    largest: str = ""
    falls_back_to: Dtype | None = None
    file_variant: str = ""

    @property
    def torch_name(self) -> str | None:
        """The attribute of `torch` that is this dtype; None for `keep`."""
        return self.name if self.safetensors else None


DTYPES: Mapping[str, StorageDtype] = {
    dtype.name: dtype
    for dtype in (
        StorageDtype("float16", "F16", 2, ("fp16", "half"), "65504", "bfloat16", "fp16"),
        StorageDtype("bfloat16", "BF16", 2, ("bf16",)),
        StorageDtype("float32", "F32", 4, ("fp32", "float")),
        StorageDtype("keep"),
    )
}


def parse_dtype(variable: str, text: str) -> Dtype:
    """`text` as a storage dtype; torch's and common short names are understood. Raises InvalidSetting."""
    short = {short: dtype.name for dtype in DTYPES.values() for short in dtype.short_names}
    name = text.strip().lower().removeprefix("torch.")
    name = short.get(name, name)
    if name not in DTYPES:
        raise InvalidSetting(f"{variable}={text!r} is not a storage dtype: use one of {', '.join(DTYPES)}")
    return cast(Dtype, name)


def accepted_dtypes(dtype: Dtype, overflow: Overflow) -> tuple[Dtype, ...]:
    """The dtypes that a caller accepts, the preferred one first: `dtype`, and its fallback if `overflow` allows that
    one."""
    fallback = DTYPES[dtype].falls_back_to
    return (dtype, fallback) if fallback is not None and overflow == fallback else (dtype,)
