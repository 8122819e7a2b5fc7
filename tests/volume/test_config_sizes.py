"""Configs whose sizes the weights do not bear out: refused, before they take the memory."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from modelstore import load_model
from modelstore.errors import BadConfig
from modelstore.load.model import bounded_build
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.volume.config_sizes import Sizes
from modelstore.warmstart import begin
from tests.support.models import write_model


def change(folder: Path, changes: dict[str, Any]) -> str:
    write_model(folder, seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return f"file://{folder}"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e9},
        {"num_hidden_layers": float("inf")},
        {"num_hidden_layers": 2000},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"vision_config": [{"depths": [2, 2, 10**7]}]},
        {"hidden_size": 10**12},
        {"head_dim": 10**9},
        {"num_attention_heads": 10**7},
        {"num_local_experts": 10**8},
        {"vocab_size": 10**15},
    ],
)
def test_a_size_that_the_weights_do_not_bear_out_is_refused_before_it_is_published(
    store: ModelStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(BadConfig, match=r"config.json of local/m says .*do not bear out") as caught:
        store.ensure(change(tmp_path / "m", changes))
    assert caught.value.exit_code == 5
    assert not list(store.layout.models.glob("*/*"))
    assert not list((store.layout.root / "staging").glob("*/*/*"))


def test_the_sizes_of_real_models_pass() -> None:
    """Of Llama 4 Scout, Kimi K2, Gemma 3n, GPT-2, Mamba, Flux and a tiny test model with the defaults of its parts."""
    configs = [
        (1000, 16384, {"max_position_embeddings": 10485760, "num_local_experts": 16, "vocab_size": 202048}),
        (60_000, 163840, {"n_routed_experts": 384, "num_hidden_layers": 61, "moe_intermediate_size": 2048}),
        (900, 262400, {"vocab_size_per_layer_input": 262144, "num_hidden_layers": 35, "rope_theta": 1e6}),
        (148, 50257, {"n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None}),
        (300, 50280, {"time_step_limit": [0.0, float("inf")], "num_hidden_layers": 48, "state_size": 128}),
        (780, 21504, {"num_layers": 19, "num_single_layers": 38, "axes_dims_rope": [16, 56, 56]}),
        (
            12,
            99,
            {"num_hidden_layers": 2, "vision_config": {"image_size": 224, "hidden_size": 768, "vocab_size": 49408}},
        ),
        (4, 8, {"attention_block_size": 131072, "quantization_config": {"weight_block_size": [128, 128]}}),
    ]
    for tensors, longest, config in configs:
        Sizes(tensors, longest).check(config, "config.json")
        Sizes().check(config, "config.json")


@pytest.mark.slow
def test_the_default_config_of_every_model_type_passes() -> None:
    """With no more weights than a small member of the family has."""
    tried = 0
    for name in tf.CONFIG_MAPPING:
        try:
            config = tf.CONFIG_MAPPING[name]().to_dict()
        except Exception:  # noqa: S112  some have parts without defaults
            continue
        tried += 1
        for sizes in (Sizes(), Sizes(300, 50_000)):
            sizes.check(config, name)
    assert tried > 350


@pytest.mark.parametrize("layers", [10**9, 30_000])
def test_a_snapshot_of_an_earlier_version_takes_no_memory_either(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(Sizes, "check", lambda *_: None)
        reference = change(tmp_path / "m", {"num_hidden_layers": layers})
        snapshot = store.ensure(reference)
    began = time.monotonic()
    with pytest.raises(BadConfig, match=r"do not bear out|more layers than its"):
        load_model(snapshot, "cpu")
    pending = begin(replace(store.settings, model=parse_reference(reference)))
    with pytest.raises(BadConfig):
        pending.load(lambda b: load_model(b.snapshot, "cpu", reading=b.reading))
    pending.in_use.end()
    assert time.monotonic() - began < 20


def test_a_build_makes_no_tensor_that_is_larger_than_all_weights(store: ModelStore, tmp_path: Path) -> None:
    snapshot = store.ensure(change(tmp_path / "m", {}))
    positions = torch.arange(10_000_000)
    with bounded_build(snapshot, 12):
        assert torch.ones(100, 100, device="cpu").sum() == 10_000
        assert (positions * 2)[-1] == 19_999_998
        for make in (
            lambda: torch.ones(10**6, 10**6, dtype=torch.bool, device="cpu"),
            lambda: torch.arange(10**12, device="cpu"),
            lambda: torch.outer(positions, positions),
            lambda: positions[:, None] * positions,
        ):
            with pytest.raises(BadConfig, match="wants a tensor of"):
                make()
        torch.empty(10**6, 10**6, device="meta")
    few = torch.arange(130_000.0)
    with bounded_build(snapshot, 12):
        for make in (
            lambda: torch.outer(few, few),
            lambda: torch.einsum("i,j->ij", few, few),
            lambda: few.repeat(130_000),
            lambda: few.new_zeros(130_000, 130_000),
            lambda: torch.empty_like(torch.empty(10**6, 10**6, device="meta"), device="cpu"),
            lambda: torch.nn.functional.pad(few, (0, 10**10)),
            lambda: torch.arange(10**12),
        ):
            with pytest.raises(BadConfig, match="wants a tensor of"):
                make()


def test_a_build_makes_no_more_tensors_than_its_weights_bear_out(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelstore.load.model._BUILT_BYTES", 1 << 20)
    snapshot = store.ensure(change(tmp_path / "m", {}))
    with bounded_build(snapshot, 12):
        made = [torch.ones(100_000) for _ in range(15)]
        with pytest.raises(BadConfig, match="wants a tensor of"):
            made += [torch.ones(100_000) for _ in range(15)]
