"""A checkpoint's index is checked, corrected if need be, and else left byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelstore.errors import BadSafetensors
from modelstore.fill.indexes import (
    index_of_converted,
    index_with_places,
    index_with_total_size,
    misplaced_tensors,
)
from modelstore.volume.header import Header, TensorInfo

SHARDS = {
    "unet/a-1-of-2.safetensors": Header((TensorInfo("x", "F16", (2,), 0, 4),), {}, 8),
    "unet/a-2-of-2.safetensors": Header((TensorInfo("y", "F16", (2,), 0, 4),), {}, 8),
}


def test_an_index_is_checked_against_the_headers_beside_it() -> None:
    path = "unet/a.safetensors.index.json"
    right = {"x": "a-1-of-2.safetensors", "y": "a-2-of-2.safetensors"}
    assert not misplaced_tensors(path, right, SHARDS, {})
    for config in ({}, {"model_type": "llama"}, {"model_type": "no-such-type"}):
        with pytest.raises(
            BadSafetensors, match=r"places 'q_proj.weight' in a-1-of-2.safetensors, which does not hold it"
        ):
            misplaced_tensors(path, right | {"q_proj.weight": "a-1-of-2.safetensors"}, SHARDS, config)


def test_shards_that_an_index_exchanges_are_corrected() -> None:
    """transformers opens all of them, and takes each tensor from the one that holds it."""
    wrong = {"x": "a-2-of-2.safetensors", "y": "a-1-of-2.safetensors"}
    places = misplaced_tensors("unet/a.safetensors.index.json", wrong, SHARDS, {})
    assert places == {"x": "a-1-of-2.safetensors", "y": "a-2-of-2.safetensors"}
    data = json.dumps({"metadata": {"a": 1}, "weight_map": wrong}).encode()
    assert json.loads(index_with_places(data, places, where="i")) == {"metadata": {"a": 1}, "weight_map": places}
    assert index_with_places(data, {}, where="i") is data


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("bert", "bert.embeddings.position_ids"),
        ("clip", "text_model.embeddings.position_ids"),
    ],
)
def test_entries_of_old_buffers_may_be_stale(model_type: str, tensor: str) -> None:
    right = {"x": "a-1-of-2.safetensors", "y": "a-2-of-2.safetensors"}
    stale = right | {tensor: "a-2-of-2.safetensors"}
    places = misplaced_tensors("unet/a.safetensors.index.json", stale, SHARDS, {"model_type": model_type})
    assert places == {tensor: None}
    data = json.dumps({"weight_map": stale}).encode()
    assert json.loads(index_with_places(data, places, where="i")) == {"weight_map": right}


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
