"""The files of a repo by their names: what is weights, what is small and kept, and the name that each is stored under.

Kept beside the weights: configs, tokenizer files, chat templates, generation config, licences. Left out: the same
weights as `.bin`, `.h5`, `.msgpack`, `.onnx`, `.gguf`; code; what training left behind; pictures.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

from modelstore.errors import BadSafetensors
from modelstore.fill.source import SourceFile

TOKENIZER_FILES = frozenset({
    "added_tokens.json", "audio_tokenizer_config.json", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json",
    "entity_vocab.json", "merges.txt", "normalizer.json", "preprocessor_config.json", "processor_config.json",
    "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "special_tokens_map.json",
    "spiece.model", "spm.model", "spm_char.model", "target.spm", "target_vocab.json", "tiktoken.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab-src.json",
    "vocab-tgt.json", "vocab.json", "vocab.txt", "word_pronunciation.json", "word_shape.json",
})  # fmt: skip
"""The default names of tokenizer and processor files in transformers; a test compares them with it."""

_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe"})
_VERSIONED_TOKENIZER = re.compile(r"tokenizer(\.\w+)*\.model\.v\w+")  # of Mistral
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([-_.].*)?", re.IGNORECASE)
_FOREIGN = re.compile(r"(pytorch_model|tf_model|flax_model|consolidated|rust_model).*\.json|trainer_state\.json")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_OTHER_WEIGHTS = frozenset({".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pb", ".tflite"})
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler)[^/]*|events\.out\..*")
_FOREIGN_WEIGHTS = re.compile(r"(adapter_model|open_clip|optimizer|.*lora)[^/]*\.safetensors", re.IGNORECASE)
_STEM = r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)"
_SHARD = r"-\d+-of-\d+"
_VARIANTS = (
    re.compile(rf"{_STEM}\.(?P<variant>[\w-]+?)(?P<shard>{_SHARD})?(?P<suffix>\.safetensors|\.bin)"),
    re.compile(rf"{_STEM}(?P<shard>{_SHARD})\.(?P<variant>[\w-]+)(?P<suffix>\.safetensors|\.bin)"),
    re.compile(rf"{_STEM}(?P<shard>)(?P<suffix>\.(safetensors|bin)\.index)\.(?P<variant>[\w-]+)\.json"),
    re.compile(rf"{_STEM}(?P<shard>)(?P<suffix>\.(safetensors|bin))\.(?P<variant>[\w-]+)(?P<ending>\.index\.json)"),
)
_INDEX_ENDINGS = (".safetensors.index", ".bin.index")
MAX_SMALL_BYTES = 512 << 20


def is_pickle(path: str) -> bool:
    """Whether a file of weights is a pickle."""
    return PurePosixPath(path).suffix in _PICKLES


def is_weights(path: str) -> bool:
    """Whether a file holds weights, in any format; not what training leaves beside them."""
    name = PurePosixPath(path)
    suffixes = {".safetensors", *_PICKLES, *_OTHER_WEIGHTS}
    return name.suffix in suffixes and not _NO_WEIGHTS.fullmatch(name.name)


def is_foreign_weights(path: str) -> bool:
    """Whether a safetensors file is, by its name, not the model's own: an adapter, or a copy in another layout."""
    return _FOREIGN_WEIGHTS.fullmatch(PurePosixPath(path).name) is not None


def variant_of(path: str) -> str:
    """The infix of a file that holds, or lists, weights in another form than the plain ones, such as `fp16`; else
    empty."""
    match = _variant_match(path)
    return match["variant"] if match else ""


def _variant_match(path: str) -> re.Match[str] | None:
    name = PurePosixPath(path).name
    return next((match for pattern in _VARIANTS if (match := pattern.fullmatch(name))), None)


def is_index(path: str) -> bool:
    """Whether a file lists the weights of others."""
    return _plain_name(path).endswith(tuple(f"{ending}.json" for ending in _INDEX_ENDINGS))


def is_licence(path: str) -> bool:
    name = PurePosixPath(path)
    return _LICENCE.fullmatch(name.name) is not None and name.suffix not in {".py", ".sh"}


def is_small(file: SourceFile) -> bool:
    """Whether a file is kept beside the weights."""
    name = PurePosixPath(file.path)
    if name.name.startswith(".") or file.size_bytes > MAX_SMALL_BYTES:
        return False
    if is_licence(file.path) or name.name in TOKENIZER_FILES:
        return True
    if is_index(file.path):
        return False  # the one that is used is chosen with the weights
    if _VERSIONED_TOKENIZER.fullmatch(name.name):
        return True
    return name.suffix in _SMALL_SUFFIXES and not _FOREIGN.fullmatch(name.name)


def stored_path(path: str) -> str:
    """The name under which a file is stored: a pickle and its index get the names of the converted files, a variant
    and its index those of the plain ones."""
    name = _plain_name(path)
    if name.endswith(".bin.index.json"):
        name = _stored_stem(name.removesuffix(".bin.index.json")) + ".safetensors.index.json"
    elif is_pickle(name):
        name = _stored_stem(PurePosixPath(name).stem) + ".safetensors"
    return join(folder_of(path), name)


def _plain_name(path: str) -> str:
    """The name of a file without the infix of its variant."""
    match = _variant_match(path)
    if match is None:
        return PurePosixPath(path).name
    ending = match.groupdict().get("ending") or (".json" if match["suffix"].endswith(".index") else "")
    return f"{match['stem']}{match['shard'] or ''}{match['suffix']}{ending}"


def _stored_stem(stem: str) -> str:
    return "model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem


def parse_json(data: bytes, path: str) -> Any:
    """A repo's own JSON. Raises BadSafetensors, which names `path`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSafetensors(f"{path} is not JSON ({error}): the repo is damaged, name another revision") from error


def parse_object(data: bytes, path: str) -> dict[str, Any]:
    """A repo's own JSON, empty if it is no object. Raises BadSafetensors, which names `path`."""
    record = parse_json(data, path)
    return record if isinstance(record, dict) else {}


def folder_of(path: str) -> str:
    """The folder of a path in a repo; empty for the repo's root."""
    return path.rpartition("/")[0]


def join(folder: str, name: str) -> str:
    """The path of a name in a folder of a repo; the folder is empty for the repo's root."""
    return f"{folder}/{name}" if folder else name
