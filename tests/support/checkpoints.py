"""Small checkpoints made with numpy alone, as the Hub would hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from modelstore.store import ModelStore

LLAMA_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "vocab_size": 64,
}


def random_tensors(count: int, shape: tuple[int, ...] = (256, 256), *, seed: int = 0) -> dict[str, Any]:
    """fp32 tensors with the spread of real weights."""
    rng = np.random.default_rng(seed)
    return {f"layers.{i}.weight": (rng.standard_normal(shape) * 0.02).astype(np.float32) for i in range(count)}


def write_repo(
    folder: Path,
    tensors: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, bytes] | None = None,
    save: Callable[..., None] = save_file,
) -> Path:
    """A repo of a transformers model: config, tokenizer files, weights in one file or in shards with an index.

    `save`: of the library that the tensors are of, numpy by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(4) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(dict(LLAMA_CONFIG if config is None else config)))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("# a model\n")
    for name, data in (extra or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    names = sorted(tensors)
    if shards == 1:
        save(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def weights_bytes(folder: Path) -> int:
    """What the weights of a repo take, in bytes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def published(store: ModelStore) -> list[Path]:
    """Everything below `models/`."""
    return sorted(store.layout.models.rglob("*")) if store.layout.models.exists() else []
