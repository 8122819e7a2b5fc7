"""Coverage-guided fuzzing of the header parser against the reference: `python -m tests.support.fuzz_header CORPUS [libFuzzer options]`.

Headers that we take, safetensors must take too, with the same tensors; we refuse with BadSafetensors and nothing else.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["modelstore.volume.header"]):
    from modelstore.volume.header import LENGTH_BYTES, header_length, parse_header

from safetensors import deserialize

from modelstore.errors import BadSafetensors


def one(data: bytes) -> None:
    try:
        length = header_length(data[:LENGTH_BYTES], file_bytes=len(data), where="fuzz")
        header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], file_bytes=len(data), where="fuzz")
    except BadSafetensors:
        return
    theirs = {name: list(info["shape"]) for name, info in deserialize(data)}
    assert {tensor.name: list(tensor.shape) for tensor in header.tensors} == theirs


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
