"""A checkpoint's index is checked, corrected if need be, and else left byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelstore.errors import BadSafetensors
from modelstore.fill.indexes import absent_tensors, index_of_converted, index_with_total_size
from modelstore.volume.header import Header, TensorInfo

SHARDS = {
    "unet/a-1-of-2.safetensors": Header((TensorInfo("x", "F16", (2,), 0, 4),), {}, 8),
    "unet/a-2-of-2.safetensors": Header((TensorInfo("y", "F16", (2,), 0, 4),), {}, 8),
}


def test_an_index_is_checked_against_the_headers_beside_it() -> None:
    path = "unet/a.safetensors.index.json"
    assert not absent_tensors(path, {"x": "a-1-of-2.safetensors", "y": "a-2-of-2.safetensors"}, SHARDS, {})
    with pytest.raises(BadSafetensors, match=r"places 'y' in a-1-of-2.safetensors, which does not hold it"):
        absent_tensors(path, {"x": "a-1-of-2.safetensors", "y": "a-1-of-2.safetensors"}, SHARDS, {})


@pytest.mark.parametrize("index", [{"weight_map": {}}, {"metadata": None}, {"metadata": {"format": "pt"}}])
def test_without_a_total_nothing_is_added_up(index: dict[str, Any]) -> None:
    data = json.dumps(index, indent=7).encode()
    assert index_with_total_size(data, lambda: pytest.fail("nobody asked"), where="i") is data


def test_a_right_total_leaves_every_byte_and_a_wrong_one_is_corrected() -> None:
    index = {"metadata": {"total_size": 8, "format": "pt"}, "weight_map": {"x": "a"}}
    data = json.dumps(index, indent=7).encode()
    assert index_with_total_size(data, lambda: 8, where="i") is data
    corrected = json.loads(index_with_total_size(data, lambda: 4, where="i"))
    assert corrected == {"metadata": {"total_size": 4, "format": "pt"}, "weight_map": {"x": "a"}}


def test_a_file_that_is_no_json_is_named() -> None:
    with pytest.raises(BadSafetensors, match=r"unet/i\.json is not JSON"):
        index_with_total_size(b"{", lambda: 8, where="unet/i.json")


def test_the_index_of_pickles_names_the_converted_files() -> None:
    index = {"metadata": {"total_size": 8}, "weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}
    stored = json.loads(index_of_converted(index))
    assert stored == index | {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
