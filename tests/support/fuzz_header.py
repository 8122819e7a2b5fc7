"""Coverage-guided fuzzing of the header parser against the reference: `python -m tests.support.fuzz_header CORPUS [libFuzzer options]`.

Headers that we take, safetensors must take too, with the same tensors; we refuse with BadSafetensors and nothing else.
"""

from __future__ import annotations

import resource
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


MEMORY_BYTES = 2 << 30

if __name__ == "__main__":
    # libFuzzer's own limit reads the peak of the process, which Linux carries over from a parent that used more.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    atheris.Setup([*sys.argv, "-rss_limit_mb=0"], one)
    atheris.Fuzz()
