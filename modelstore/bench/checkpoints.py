"""Checkpoints of a given size for measurements: a llama of random weights, with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstore.dtypes import DTYPES
from modelstore.errors import InvalidSetting
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume.header import DTYPE_BITS, TensorInfo, encode_header

_VOCABULARY = 32_000


def make_checkpoint(
    folder: Path, stored_bytes: int, dtype: str, *, born: str = "float32", shard_bytes: int = 5 * 10**9
) -> Path:
    """A Llama with random weights that takes about `stored_bytes` in 16 bits, in `dtype` and in shards.

    `born`: the dtype that the weights had before, whose precision is all that they have: `float32` or `bfloat16`.
    """
    if stored_bytes < 10**6:
        raise InvalidSetting("a model to measure with needs at least 1MB: name a larger --size")
    hidden, width = (2048, 5632) if stored_bytes > 6 * 10**8 else (256, 704)
    vocabulary = _VOCABULARY if stored_bytes > 6 * 10**8 else 1000
    layer = 4 * hidden * hidden + 3 * hidden * width + 2 * hidden
    layers = max(1, round((stored_bytes / 2 - 2 * vocabulary * hidden) / layer))
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for number in range(layers):
        name = f"model.layers.{number}"
        shapes += [(f"{name}.self_attn.{part}_proj.weight", (hidden, hidden)) for part in "qkvo"]
        shapes += [(f"{name}.mlp.{part}_proj.weight", (width, hidden)) for part in ("gate", "up")]
        shapes += [(f"{name}.mlp.down_proj.weight", (hidden, width))]
        shapes += [(f"{name}.{part}_layernorm.weight", (hidden,)) for part in ("input", "post_attention")]
    shapes += [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": 2048,
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": hidden // 64,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, "a": 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    _write_weights(folder, shapes, weights_bytes(dtype, born=born), DTYPES[dtype].safetensors, shard_bytes)
    return folder


def weights_bytes(dtype: str, *, born: str) -> memoryview:
    """4 million weights as trained ones are spread: normal, and each row of 2048 with a scale of its own."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((2048, 2048)) * 0.02 * np.exp(random.standard_normal((2048, 1)) / 2)
    block = rows.astype("<f4").reshape(-1)
    if born == "bfloat16":
        block = (_bfloat16(block).astype("<u4") << 16).view("<f4")
    return memoryview({"float32": block, "float16": block.astype("<f2"), "bfloat16": _bfloat16(block)}[dtype].tobytes())


def _write_weights(
    folder: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], data: memoryview, safetensors: str, shard_bytes: int
) -> None:
    width = DTYPE_BITS[safetensors] // 8
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    shard_size = 0
    for name, shape in shapes:
        length = int(np.prod(shape)) * width
        if shard_size and shard_size + length > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append((name, shape))
        shard_size += length
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        is_single = len(shards) == 1
        path = folder / ("model.safetensors" if is_single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        infos, begin = [], 0
        for name, shape in shard:
            end = begin + int(np.prod(shape)) * width
            infos.append(TensorInfo(name, safetensors, shape, begin, end))
            weight_map[name] = path.name
            begin = end
        with path.open("wb") as file:
            file.write(encode_header(tuple(infos), {"format": "pt"}))
            for remaining in range(begin, 0, -len(data)):
                file.write(data[:remaining])
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _bfloat16(values: Any) -> Any:
    """The upper halves of float32 values."""
    return (values.view("<u4") >> 16).astype("<u2")


def seeded(root: Path, checkpoint: Path, *, compressed: bool = False) -> Path:
    """The checkpoint in a store, in float16; returns the snapshot's folder."""
    return (
        ModelStore(root, settings=Settings(root=root, compress="always" if compressed else "never"))
        .ensure(f"file://{checkpoint}")
        .path
    )


def snapshot_of(root: Path) -> Path:
    """The folder of the only snapshot of a store."""
    (snapshot,) = ModelStore(root, settings=Settings(root=root)).snapshots()
    return snapshot.path
