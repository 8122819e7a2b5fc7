"""The safetensors header against its reference implementation."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file, save_file

from modelstore.errors import BadSafetensors
from modelstore.volume.header import DTYPE_BITS, LENGTH_BYTES, TensorInfo, encode_header, header_length, parse_header
from tests.support.checkpoints import random_tensors
from tests.support.fuzzing import FUZZ_S, fuzz
from tests.support.records import record


def parse(data: bytes) -> Any:
    length = header_length(data[:LENGTH_BYTES], file_bytes=len(data), where="x")
    return parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], file_bytes=len(data), where="x")


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "empty file": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "header longer than the file": struct.pack("<Q", 100) + b"{}",
    "header over the limit": struct.pack("<Q", 2**40) + b"{}",
    "not JSON": with_header(b"nonsense"),
    "not an object": with_header(b"[]"),
    "leading space": with_header(b" {}"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "duplicate key": with_header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
                                 b'"data_offsets":[0,1]}}', b"\0"),
    "overlap": with_header({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"\0" * 12),
    "gap": with_header({"a": tensor(), "b": tensor(offsets=(12, 20))}, b"\0" * 20),
    "first not at 0": with_header({"a": tensor(offsets=(8, 16))}, b"\0" * 16),
    "offsets beyond the file": with_header({"a": tensor()}, b"\0" * 4),
    "trailing bytes": with_header({"a": tensor()}, b"\0" * 9),
    "reversed offsets": with_header({"a": tensor(shape=(0,), offsets=(8, 0))}, b"\0" * 8),
    "shape that overflows": with_header({"a": tensor(shape=(2**33, 2**33), offsets=(0, 8))}, b"\0" * 8),
    "shape that overflows on the way to 0": with_header({"a": tensor(shape=(2**40, 2**40, 0), offsets=(0, 0))}),
    "negative shape": with_header({"a": tensor(shape=(-2,))}, b"\0" * 8),
    "fractional shape": with_header({"a": tensor(shape=(2.0,))}, b"\0" * 8),
    "boolean shape": with_header({"a": tensor("U8", shape=(True,), offsets=(0, 1))}, b"\0"),
    "an offset of minus zero": with_header(b'{"a":{"dtype":"F4","shape":[0],"data_offsets":[0,-0]}}'),
    "a shape of minus zero": with_header(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
    "wrong size for the dtype": with_header({"a": tensor("F16")}, b"\0" * 8),
    "unknown dtype": with_header({"a": tensor("F31")}, b"\0" * 8),
    "half a byte": with_header({"a": tensor("F4", shape=(3,), offsets=(0, 1))}, b"\0"),
    "a missing field": with_header({"a": {"dtype": "U8", "shape": [1]}}, b"\0"),
    "metadata that is no string": with_header({"__metadata__": {"a": 1}}),
    "metadata that is no map": with_header({"__metadata__": []}),
    "NaN": with_header(b'{"__metadata__": {"a": NaN}}'),
    "deep nesting": with_header(b"{" + b'"a":[' * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("data", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(BadSafetensors) as caught:
        parse(data)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


names = st.sampled_from(["a", "b", "__metadata__", "c.d", ""])
sizes = st.integers(-1, 4) | st.sampled_from([2**32, 2**63, 2**64])
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F31"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2),
    }
)
headers = st.dictionaries(names, fields | st.dictionaries(names, st.text(max_size=2)), max_size=3)


@settings(max_examples=400, deadline=None)
@given(header=headers | st.binary(max_size=40), data=st.binary(max_size=24))
def test_a_header_that_the_reference_refuses_is_refused_here(header: Any, data: bytes) -> None:
    file = with_header(header, data)
    try:
        parse(file)
    except BadSafetensors:
        return
    deserialize(file)  # raises where the reference refuses what we took


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_never_gets_past_us_and_not_the_reference(position: int, value: int) -> None:
    file = bytearray(with_header({"a": tensor(), "b": tensor("F16", (3,), (8, 14))}, bytes(range(14))))
    file[position % len(file)] = value
    try:
        ours = parse(bytes(file))
    except BadSafetensors:
        return
    try:
        theirs = dict(deserialize(bytes(file)))
    except SafetensorError as error:
        pytest.fail(f"the reference refuses what we take: {error}")
    assert {t.name: list(t.shape) for t in ours.tensors} == {name: info["shape"] for name, info in theirs.items()}


def test_a_real_file_parses_and_its_encoding_loads(tmp_path: Path) -> None:
    tensors = random_tensors(3, (5, 7))
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "x.safetensors").read_bytes()
    header = parse(data)
    assert header.metadata == {"format": "pt"}
    encoded = encode_header(header.tensors, header.metadata)
    assert len(encoded) % 8 == 0
    (tmp_path / "y.safetensors").write_bytes(encoded + data[header.data_start :])
    loaded = load_file(tmp_path / "y.safetensors")
    assert all((loaded[name] == value).all() for name, value in tensors.items())


def test_encoding_is_deterministic() -> None:
    tensors = (TensorInfo("é", "F16", (2,), 0, 4),)
    assert encode_header(tensors, {"b": "1", "a": "2"}) == encode_header(tensors, {"a": "2", "b": "1"})


@pytest.mark.slow
def test_coverage_guided_fuzzing_finds_nothing_that_the_reference_refuses(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    fine = {"fine": with_header({"a": tensor(), "b": tensor("F16", (3,), (8, 14))}, bytes(range(14)))}
    for number, data in enumerate({**fine, **LIES}.values()):
        if len(data) < 10_000:
            (corpus / str(number)).write_bytes(data)
    runs_done = fuzz("fuzz_header", corpus)
    record(
        "Hostile input does nothing",
        f"headers from a coverage-guided fuzzer, {FUZZ_S} s: whatever the reference refuses is refused",
        tried=runs_done,
        survived=runs_done,
    )
    assert runs_done > 1000
