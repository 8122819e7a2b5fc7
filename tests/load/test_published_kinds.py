"""Ten kinds of repositories as they are published: seeded, verified, and loaded by their natural loader from the path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from modelstore.errors import ModelStoreError
from modelstore.load.model import load_model, load_tensors
from modelstore.store import ModelStore
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot
from tests.handler.test_diffusion import write_pipeline
from tests.support.models import MODELS, SMALL, write_model

pytestmark = pytest.mark.filterwarnings("ignore")


def stored(store: ModelStore, folder: Path) -> Snapshot:
    snapshot = store.ensure(f"file://{folder}")
    assert verify_snapshot(snapshot).ok
    return snapshot


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    assert type(ours) is type(theirs)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def vision_language_model() -> tf.PreTrainedModel:
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = tf.LlamaConfig(**SMALL, num_key_value_heads=2)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))


TRANSFORMERS: dict[str, tuple[Callable[[], tf.PreTrainedModel], str, Any]] = {
    "causal, sharded": (MODELS["llama"], "60KB", tf.AutoModelForCausalLM),
    "causal, one file": (MODELS["gpt2, tied"], "1GB", tf.AutoModelForCausalLM),
    "mixture of experts": (MODELS["mixture of experts"], "200KB", tf.AutoModelForCausalLM),
    "vision and language": (vision_language_model, "100KB", tf.AutoModelForImageTextToText),
    "encoder": (MODELS["bert"], "1GB", tf.AutoModelForMaskedLM),
    "whisper": (MODELS["whisper"], "1GB", tf.AutoModelForSpeechSeq2Seq),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_model_of_transformers(store: ModelStore, tmp_path: Path, kind: str) -> None:
    build, shard_size, auto = TRANSFORMERS[kind]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    theirs = auto.from_pretrained(tmp_path / "model", dtype=torch.float16)
    ours = auto.from_pretrained(stored(store, tmp_path / "model").path, dtype=torch.float16)
    assert_same_state(ours, theirs)


def test_a_sentence_transformer_with_a_dense_module(store: ModelStore, tmp_path: Path) -> None:
    import sentence_transformers
    from sentence_transformers import models as modules

    torch.manual_seed(0)
    base = tmp_path / "base"
    write_model(base, seed=1)  # for its tokenizer
    tf.BertModel(tf.BertConfig(**{**SMALL, "vocab_size": 12}), add_pooling_layer=False).save_pretrained(base)
    tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<end>"})
    tokenizer.save_pretrained(base)
    word = modules.Transformer(str(base))
    model = sentence_transformers.SentenceTransformer(
        modules=[word, modules.Pooling(64), modules.Dense(64, 16), modules.Normalize()], device="cpu"
    )
    model.save(str(tmp_path / "model"))
    snapshot = stored(store, tmp_path / "model")
    assert "2_Dense/model.safetensors" in snapshot.manifest.paths
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu").half()
    ours = sentence_transformers.SentenceTransformer(str(snapshot.path), device="cpu").half()
    for (name, tensor), (other_name, other) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert (name, True) == (other_name, torch.equal(tensor, other))
    assert ours.encode(["hello world"]).shape == (1, 16)


def with_safety_checker(folder: Path) -> None:
    """Make the pipeline in `folder` one of Stable Diffusion 1.x, with a safety checker."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "projection_dim": 32,
    }  # fmt: skip
    torch.manual_seed(1)
    checker = StableDiffusionSafetyChecker(tf.CLIPConfig(vision_config=vision, projection_dim=32))
    checker.save_pretrained(folder / "safety_checker")
    tf.CLIPImageProcessor(size=28, crop_size=28).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["with a safety checker", "with files at its root", "in the fp16 variant alone"])
def test_a_pipeline_of_diffusers(store: ModelStore, tmp_path: Path, kind: str) -> None:
    import diffusers

    folder, options = tmp_path / "model", {}
    write_pipeline(folder)
    match kind:
        case "with a safety checker":
            with_safety_checker(folder)
        case "with files at its root":
            for name in ("sd_xl_base_1.0.safetensors", "sd_xl_offset_example-lora_1.0.safetensors"):
                shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / name)
        case "in the fp16 variant alone":
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
            shutil.rmtree(folder)
            pipeline.save_pretrained(folder, variant="fp16")
            options = {"variant": "fp16"}
    snapshot = stored(store, folder)
    assert not [path for path in snapshot.manifest.paths if path.endswith(".safetensors") and "/" not in path]
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, **options)
    ours = diffusers.DiffusionPipeline.from_pretrained(snapshot.path, torch_dtype=torch.float16)
    parts = {name for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)}
    assert parts >= {"unet", "vae", "text_encoder"}
    assert ("safety_checker" in parts) is (kind == "with a safety checker")
    for name in parts:
        assert_same_state(ours.components[name], theirs.components[name])


QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "FP8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        {"weight": torch.randn(64, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(2, 2)},
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        {
            "qweight": torch.randint(-9, 9, (8, 64), dtype=torch.int32),
            "qzeros": torch.zeros(1, 8, dtype=torch.int32),
            "scales": torch.rand(1, 64),
            "g_idx": torch.zeros(64, dtype=torch.int32),
        },
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
        {
            "qweight": torch.randint(-9, 9, (64, 8), dtype=torch.int32),
            "qzeros": torch.zeros(1, 8, dtype=torch.int32),
            "scales": torch.rand(1, 64),
        },
    ),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_model_is_stored_bit_for_bit(store: ModelStore, tmp_path: Path, kind: str) -> None:
    """Their kernels need a GPU, so every byte that their loaders open is compared instead."""
    quantization, parts = QUANTIZED[kind]
    folder = tmp_path / "model"
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=4)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and "self_attn" in name]:
        del tensors[name]
        tensors |= {name.removesuffix("weight") + part: tensor.clone() for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    snapshot = stored(store, folder)
    for name in ("config.json", "model.safetensors"):
        assert (snapshot.path / name).read_bytes() == (folder / name).read_bytes()
    loaded = load_tensors(snapshot, "cpu")
    assert all(torch.equal(loaded[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)
    assert tf.AutoConfig.from_pretrained(snapshot.path).quantization_config == quantization


# The table in docs/migrate.md: the method, as a config states it, and the library that transformers asks for
NEED_A_LIBRARY: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    "gptq": ({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "optimum"),
    "awq": ({"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, "gptqmodel"),
    "compressed-tensors": ({"config_groups": {}, "format": "pack-quantized"}, "compressed-tensors"),
    "hqq": ({"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, "HQQ"),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, "torchao"),
}


@pytest.mark.parametrize("method", NEED_A_LIBRARY)
def test_a_quantization_that_needs_a_library_names_it(store: ModelStore, tmp_path: Path, method: str) -> None:
    config_of_method, library = NEED_A_LIBRARY[method]
    if find_spec(library.replace("-", "_").lower()) is not None:
        pytest.skip(f"{library} is installed here")
    folder = tmp_path / "model"
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=4)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **config_of_method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelStoreError, match=library):
        load_model(stored(store, folder), "cpu")
