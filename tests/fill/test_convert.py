"""The storage dtype: numpy rounds as torch does, and nothing becomes infinite unseen."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from modelstore.dtypes import Dtype
from modelstore.errors import WeightOverflow
from modelstore.fill.convert import config_in_dtype, convert_file, converted_tensors, read_header
from modelstore.fill.storage_policy import storage_policy
from modelstore.fill.stored_file import StoredFile
from modelstore.volume.checksums import RunningDigests

LLAMA = {"model_type": "llama"}


def convert(
    folder: Path, tensors: dict[str, torch.Tensor], dtype: Dtype, config: dict[str, Any] = LLAMA
) -> dict[str, Any]:
    source, target = folder / "in.safetensors", folder / "out.safetensors"
    save_torch(tensors, source)
    header = read_header(source, where="in")
    with StoredFile(target) as output:
        convert_file(source, output, header, storage_policy(dtype, config), ready=lambda _offset, _length: None)
        record = output.finish(target.name, None)
    data = target.read_bytes()
    own = RunningDigests()
    own.update(data)
    assert (record.size_bytes, record.sha256, record.blocks) == (len(data), *astuple(own.finish()))
    return load_torch(target)


EDGES = torch.tensor(
    [0.0, -0.0, 1.0, 65504.0, 65519.99, -65519.99, 6e-5, 5.96e-8, 2.98e-8, 2.99e-8, 1e-30, float("inf"), float("-inf")]
)


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", ["float16", "bfloat16", "float32"])
def test_every_cast_gives_torchs_bits(tmp_path: Path, before: torch.dtype, after: Dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.cat([torch.randn(100_003, generator=generator) * scale for scale in (1e-6, 0.02, 1e3)])
    edges = EDGES if before is not torch.bfloat16 else EDGES[EDGES.to(before).float().abs() != 65536]
    tensor = torch.cat([wide, edges]).to(before)
    converted = convert(tmp_path, {"x": tensor}, after)["x"]
    assert torch.equal(converted, tensor.to(getattr(torch, after)))


def test_all_bfloat16_values_become_torchs_float16(tmp_path: Path) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    fitting = every[every.isinf() | (every.float().abs() <= 65504)]
    assert torch.equal(convert(tmp_path, {"x": fitting}, "float16")["x"], fitting.to(torch.float16))


def test_weights_that_float16_cannot_hold_stop_the_conversion_and_are_named(tmp_path: Path) -> None:
    tensors = {"fine": torch.ones(3), "big": torch.tensor([1.0, 65520.0]), "bigger": torch.tensor([-1e9])}
    with pytest.raises(WeightOverflow, match="bfloat16") as caught:
        convert(tmp_path, tensors, "float16")
    assert sorted(caught.value.tensors) == ["big", "bigger"]
    assert caught.value.exit_code == 8


def test_integers_wide_floats_and_modules_kept_in_fp32_stay_as_they_came(tmp_path: Path) -> None:
    tensors = {
        "position_ids": torch.arange(5),
        "flag": torch.tensor([True, False]),
        "wide": torch.tensor([1e-300], dtype=torch.float64),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": torch.randn(2, 3),
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": torch.randn(2, 3),
    }
    converted = convert(tmp_path, tensors, "float16", {"model_type": "t5"})
    kept = {name for name in tensors if converted[name].dtype == tensors[name].dtype}
    assert tensors.keys() - kept == {"encoder.block.0.layer.1.DenseReluDense.wi.weight"}
    assert all(torch.equal(converted[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in kept)


def test_every_tensor_begins_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3),
        "b": torch.randn(5),
        "block.0.wo": torch.randn(3),
        "c": torch.ones(3, dtype=torch.uint8),
    }
    convert(tmp_path, tensors, "float16", {"model_type": "t5"})
    widths = {"F32": 4, "F16": 2, "U8": 1}
    assert all(t.begin % widths[t.dtype] == 0 for t in read_header(tmp_path / "out.safetensors", where="x").tensors)


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(1000), "b": torch.randn(7, 9)}
    convert(tmp_path, tensors, "float16")
    first = (tmp_path / "out.safetensors").read_bytes()
    convert(tmp_path, tensors, "float16")
    assert (tmp_path / "out.safetensors").read_bytes() == first


def test_a_16_bit_checkpoint_in_its_own_dtype_needs_no_conversion(tmp_path: Path) -> None:
    save_file({"a": np.ones((3, 4), np.float16)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors", where="x")
    assert converted_tensors(header, storage_policy("float16", LLAMA)) is header.tensors


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"model_type": "llama-of-next-year"}, "not known"),
        ({"model_type": "llava", "text_config": {"model_type": "llama-of-next-year"}}, "not known"),
        ({"_class_name": "TransformerOfNextYear"}, "not known"),
    ],
)
def test_an_unknown_model_is_stored_unchanged_and_says_why(config: dict[str, Any], reason: str) -> None:
    assert reason in storage_policy("float16", config).unchanged_because


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parts_of_a_pipeline_keep_the_modules_of_their_class_in_fp32(tmp_path: Path, dtype: Any) -> None:
    names = [
        "blocks.0.norm1.weight",
        "condition_embedder.time_embedder.linear_1.weight",
        "blocks.0.attn1.norm_q.weight",
    ]
    save_file({name: np.ones(3, np.float32) for name in names}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors", where="x")
    policy = storage_policy(dtype, {"_class_name": "WanTransformer3DModel"})
    stored = {tensor.name: tensor.dtype for tensor in converted_tensors(header, policy)}
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert [stored[name] for name in names] == ["F32", "F32", short]
    plain = storage_policy(dtype, {"_class_name": "AutoencoderKL"})
    assert {tensor.dtype for tensor in converted_tensors(header, plain)} == {short}


def test_without_a_config_weights_are_converted(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors", where="x")
    assert converted_tensors(header, storage_policy("float16", None))[0].dtype == "F16"


def test_a_config_names_the_storage_dtype_wherever_it_named_another() -> None:
    config = {
        "dtype": "float32",
        "text_config": {"torch_dtype": "bfloat16", "hidden": 3},
        "quantization_config": {"dtype": "int4"},
        "name": "dtype",
    }
    assert json.loads(config_in_dtype(json.dumps(config).encode(), "float16")) == {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16", "hidden": 3},
        "quantization_config": {"dtype": "int4"},
        "name": "dtype",
    }


def test_numpy_loads_the_written_file(tmp_path: Path) -> None:
    convert(tmp_path, {"a": torch.ones(2, 3)}, "float16")
    assert load_file(tmp_path / "out.safetensors")["a"].dtype == np.float16
