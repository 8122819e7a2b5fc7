"""What must not be rounded: quantized checkpoints, however they say it, and tensors that no class loads."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelstore.errors import HubUnavailable, WeightOverflow
from modelstore.fill.storage_policy import storage_policy
from modelstore.store import ModelStore
from modelstore.volume.header import TensorInfo
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot
from tests.conftest import MakeStore
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16"}
BITS = {"quant_method": "fp8", "bits": 8}

STATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "at the top of config.json": ({"quantization_config": BITS}, {}),
    "in the config of a part": ({"text_config": {"model_type": "llama", "quantization_config": BITS}}, {}),
    "two levels down": ({"thinker_config": {"text_config": {"quantization_config": BITS}}}, {}),
    "in a list": ({"layers": [{"quantization_config": BITS}]}, {}),
    "as compression": ({"compression_config": {"format": "pack-quantized"}}, {}),
    "as MLX does": ({"quantization": {"group_size": 64, "bits": 4}}, {}),
    "quantize_config.json": ({}, {"quantize_config.json": {"bits": 4}}),
    "quant_config.json": ({}, {"quant_config.json": {"w_bit": 4}}),
    "hf_quant_config.json": ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}),
    "params.json": ({}, {"params.json": {"dim": 8, "quantization": {"qformat_weight": "fp8_e4m3"}}}),
    "params.json of Meta": ({}, {"params.json": {"dim": 8, "quantization_args": {"scheme": "int4"}}}),
}
UNSTATED: dict[str, dict[str, torch.Tensor]] = {
    "FP8 weights": {"layers.3.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)},
    "FP8 of the other kind": {"layers.3.weight": torch.ones(8, 8).to(torch.float8_e5m2)},
    "packed in int32": {"layers.3.qweight": torch.ones(8, 8, dtype=torch.int32)},
    "packed in bytes": {"layers.3.weight": torch.ones(64, 1, dtype=torch.uint8)},
    "a flat byte string": {"layers.3.weight": torch.ones(64, dtype=torch.uint8)},
    "integers": {"layers.3.weight": torch.ones(8, 8, dtype=torch.int8)},
    "blocks of MXFP4": {"layers.3.gate_up_proj_blocks": torch.ones(2, 8, 16, dtype=torch.uint8)},
}


def weights() -> dict[str, torch.Tensor]:
    """Weights and scales that float16 would round."""
    torch.manual_seed(0)
    return {f"layers.{i}.{name}": torch.randn(8, 8) * 1e-6 for i in range(3) for name in ("weight", "norm")}


def seeded(hub: Hub, store: ModelStore, tensors: dict[str, torch.Tensor], *, shards: int, **files: Any) -> Snapshot:
    extra = {name: json.dumps(record).encode() for name, record in files.items() if name != "config"}
    folder = hub.folder / "org" / "name"
    write_repo(folder, tensors, shards=shards, config=files.get("config", CONFIG), extra=extra, save=save_file)
    return store.ensure("org/name")


def assert_unchanged(snapshot: Snapshot, tensors: dict[str, torch.Tensor], repo: Path) -> None:
    stored = {name: t for file in snapshot.weights for name, t in load_file(snapshot.path / file.path).items()}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
    assert snapshot.manifest.stored_unchanged.startswith("quantized checkpoint")
    assert (snapshot.path / "config.json").read_bytes() == (repo / "config.json").read_bytes()


@pytest.mark.parametrize("kind", STATED)
def test_a_checkpoint_that_says_it_is_quantized_is_not_converted(hub: Hub, store: ModelStore, kind: str) -> None:
    config, others = STATED[kind]
    snapshot = seeded(hub, store, weights(), shards=1, config=CONFIG | config, **others)
    assert_unchanged(snapshot, weights(), hub.folder / "org" / "name")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", UNSTATED)
def test_a_checkpoint_whose_headers_show_it_is_not_converted(
    hub: Hub, store: ModelStore, kind: str, shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = weights() | UNSTATED[kind]
    snapshot = seeded(hub, store, tensors, shards=shards)
    assert_unchanged(snapshot, tensors, hub.folder / "org" / "name")
    assert re.search(r"is stored unchanged: quantized checkpoint \((it has )?layers\.3\.", caplog.text)


NAMES = ["layers.3.qweight", "layers.3.weight_scale_inv", "layers.3.weight_packed", "experts.gate_up_proj_blocks"]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_lists_scales_says_it_before_the_download(hub: Hub, store: ModelStore, name: str) -> None:
    tensors = weights() | {name: torch.ones(8, 8, dtype=torch.int32)}
    snapshot = seeded(hub, store, tensors, shards=3)
    assert_unchanged(snapshot, tensors, hub.folder / "org" / "name")
    served = sum(size for path, size in hub.served.bytes.items() if path.endswith(".safetensors"))
    assert served == sum(file.size_bytes for file in snapshot.weights), "no shard came twice"


def test_shards_that_were_converted_before_another_ones_header_are_fetched_again(hub: Hub, store: ModelStore) -> None:
    tensors = weights() | UNSTATED["FP8 weights"]
    last = "model-00001-of-00003.safetensors"  # with layers.3
    event = hub.faults.held[last] = threading.Event()

    def release() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if list(store.layout.root.glob("staging/*/*/*/done/*.safetensors.json")):
                break
            time.sleep(0.02)
        event.set()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    snapshot = seeded(hub, store, tensors, shards=3)
    thread.join(30)
    assert_unchanged(snapshot, tensors, hub.folder / "org" / "name")
    assert verify_snapshot(snapshot).ok
    assert hub.served.bytes["model-00002-of-00003.safetensors"] > snapshot.weights[1].size_bytes


def test_a_fill_that_goes_on_knows_the_headers_of_the_shards_before(hub: Hub, make_store: MakeStore) -> None:
    tensors = weights() | UNSTATED["FP8 weights"]
    store = make_store(sleep=lambda _seconds: None)
    missing = "model-00003-of-00003.safetensors"
    hub.faults.status[missing] = [(404, {})] * 1000
    with pytest.raises(HubUnavailable):
        seeded(hub, store, tensors, shards=3)
    hub.faults.status.clear()
    snapshot = store.ensure("org/name")
    assert snapshot.status == "resumed"
    assert_unchanged(snapshot, tensors, hub.folder / "org" / "name")


@pytest.mark.parametrize("name", ["layers.3.W_q", "layers.3.weight_scale_inv", "layers.3.Qidxs"])
def test_one_file_is_known_by_its_names_too(hub: Hub, store: ModelStore, name: str) -> None:
    packed = torch.ones(8, 8, dtype=torch.int64) if name.endswith("Qidxs") else torch.rand(8, 8)
    tensors = weights() | {name: packed}
    assert_unchanged(seeded(hub, store, tensors, shards=1), tensors, hub.folder / "org" / "name")


@pytest.mark.parametrize(
    "tensor",
    [
        TensorInfo("embeddings.position_ids", "I64", (1, 512), 0, 4096),
        TensorInfo("bert.embeddings.position_ids", "I32", (1, 512), 0, 2048),
        TensorInfo("h.0.attn.bias", "U8", (1, 1, 64, 64), 0, 4096),
        TensorInfo("h.0.attn.causal_mask", "U8", (64, 64), 0, 4096),
        TensorInfo("attn.relative_position_index", "I64", (49, 49), 0, 19208),
        TensorInfo("bn1.num_batches_tracked", "I64", (), 0, 8),
        TensorInfo("h.0.attn.bias", "BOOL", (64, 64), 0, 4096),
        TensorInfo("scale", "F64", (8,), 0, 64),
    ],
)
def test_buffers_of_integers_are_no_quantization(tensor: TensorInfo) -> None:
    assert storage_policy("float16", CONFIG).for_tensors([tensor]).unchanged_because == ""


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_an_empty_statement_says_nothing(config: dict[str, Any]) -> None:
    others = {"params.json": {"dim": 64, "use_scaled_rope": True}}
    assert storage_policy("float16", CONFIG | config, others).unchanged_because == ""


# Tensors that no class loads

MASKS = {
    "gpt_neo": "transformer.h.0.attn.attention.masked_bias",
    "gptj": "transformer.h.0.attn.masked_bias",
    "gpt_neox": "gpt_neox.layers.0.attention.masked_bias",
    "codegen": "transformer.h.0.attn.causal_mask",
    "gpt2": "transformer.h.0.attn.masked_bias",
    "llama": "model.layers.0.self_attn.statistic",
    "bert": "embeddings.position_embeddings_scale",
}


@pytest.mark.parametrize("model_type", MASKS)
@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_a_constant_mask_that_no_class_loads_does_not_refuse_a_model(
    hub: Hub, store: ModelStore, model_type: str, value: float
) -> None:
    name = MASKS[model_type]
    tensors = {"transformer.wte.weight": torch.ones(4, 4), name: torch.tensor(value)}
    snapshot = seeded(hub, store, tensors, shards=1, config={"model_type": model_type})
    stored = load_file(snapshot.path / "model.safetensors")
    assert stored["transformer.wte.weight"].dtype == torch.float16
    assert torch.equal(stored[name], tensors[name])
    assert verify_snapshot(snapshot).ok


def test_the_index_counts_tensors_that_no_class_loads_as_they_are_stored(hub: Hub, store: ModelStore) -> None:
    tensors = weights() | {"layers.3.masked_bias": torch.full((100,), -1e9)}
    snapshot = seeded(hub, store, tensors, shards=3, config={"model_type": "llama"})
    index = json.loads((snapshot.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 64 * 2 + 400


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"])
def test_a_weight_that_overflows_still_refuses_it(hub: Hub, store: ModelStore, name: str) -> None:
    with pytest.raises(WeightOverflow, match=name):
        seeded(hub, store, {name: torch.full((4,), 1e6)}, shards=1, config={"model_type": "gpt2"})


# What transformers keeps in float32

KEPT = {
    "lfm2_moe": "model.layers.2.feed_forward.expert_bias",
    "deepseek_v3": "model.layers.3.mlp.gate.e_score_correction_bias",
    "esm": "esm.rotary_embeddings.inv_freq",
    "hunyuan_v1_moe": "model.layers.0.mlp.gate.wg.weight",
    "glm4_moe": "model.layers.1.mlp.gate.e_score_correction_bias",
}


@pytest.mark.parametrize("model_type", KEPT)
def test_weights_that_transformers_keeps_in_float32_are_kept(model_type: str) -> None:
    policy = storage_policy("float16", {"model_type": model_type})
    assert policy.stored_dtype(TensorInfo(KEPT[model_type], "F32", (8,), 0, 32)) == "F32"
    assert policy.stored_dtype(TensorInfo("model.layers.0.self_attn.o_proj.weight", "F32", (8,), 0, 32)) == "F16"


def test_a_type_that_cannot_be_built_here_is_stored_unchanged() -> None:
    policy = storage_policy("float16", {"model_type": "timm_backbone"})
    assert "timm_backbone" in policy.unchanged_because
