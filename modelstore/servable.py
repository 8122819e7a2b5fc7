"""Whether a model can be served at all, told from its config before its weights are downloaded, and again at a start.

The table of `model_types.py` answers without an import; transformers is asked only about a type that is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from modelstore.errors import NotServable
from modelstore.model_types import generates, is_known, type_generates

CheckConfig = Callable[[Mapping[str, Any], Collection[str], str], None]
"""Gets a model's config, its files by path, and its name in messages; raises NotServable."""

_PIPELINE_INDEX = "model_index.json"  # of diffusers
_MODULES_INDEX = "modules.json"  # of sentence-transformers


def check_nothing(_config: Mapping[str, Any], _files: Collection[str], _label: str) -> None:
    """For an engine that knows by itself which models it serves."""


def check_loadable(config: Mapping[str, Any], files: Collection[str], label: str) -> None:
    """Raise NotServable if transformers has no model of this config's type, or of that of the language model in it."""
    if _PIPELINE_INDEX in files:
        raise NotServable(f"{label} is a pipeline of Diffusers, and no single model: serve it with ENGINE=diffusion")
    if "_class_name" in config:
        raise NotServable(
            f"{label} is a {str(config['_class_name'])[:80]}, a part of a Diffusers pipeline: name the pipeline"
        )
    if "adapter_config.json" in files and "config.json" not in files:
        raise NotServable(
            f"{label} is an adapter and no model by itself: name its model in MODEL_ID, and it in MODEL_ADAPTERS"
        )
    if "config.json" not in files:
        raise NotServable(f"{label} has no config.json, which names its class: load it with load_tensors")
    name = config.get("model_type")
    if config.get("auto_map"):
        return
    if not isinstance(name, str) or not name:
        raise NotServable(
            f"{label}: its config.json names no model_type, without which transformers has no class for it: use "
            "another revision"
        )
    inner = config.get("text_config")
    names = [name, inner.get("model_type") if isinstance(inner, dict) else None]
    unknown = [each for each in names if isinstance(each, str) and each and not is_known(each)]
    if not unknown:
        return
    try:
        from transformers import CONFIG_MAPPING
    except ModuleNotFoundError:
        return
    for each in unknown:
        if each not in CONFIG_MAPPING:
            raise NotServable(
                f"{label}: model type {each!r} is unknown to transformers {_version()}: upgrade transformers"
            )


def check_generates_text(config: Mapping[str, Any], files: Collection[str], label: str) -> None:
    """Raise NotServable if the model generates no text."""
    if _MODULES_INDEX in files:
        raise NotServable(
            f"{label} is an embedding model and generates no text: name a language model, or serve it with "
            "ENGINE=embedding"
        )
    check_loadable(config, files, label)
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    known = {name: answer for name in names if (answer := generates(name)) is not None}
    model_type = config.get("model_type")
    if not names and isinstance(model_type, str) and not type_generates(model_type):
        known = {f"of type {model_type}": False}
    if known and not any(known.values()):
        raise NotServable(
            f"{label} is an encoder, or another model that continues no text ({next(iter(known))}), and generates "
            "none: name a language model"
        )


def is_encoder(config: Mapping[str, Any], files: Collection[str]) -> bool:
    """Whether the model makes vectors of texts, or orders them: a sentence-transformers repo, or a model with a
    tokenizer, of a family that fills in masked words."""
    if _PIPELINE_INDEX in files or _MODULES_INDEX in files:
        return _MODULES_INDEX in files
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if generates(name) is not False or not any(file in files for file in _TOKENIZERS):
        return False
    family, is_head, head = name.partition("For")
    is_kind = f"For{head}" in _ENCODER_CLASSES if is_head else name.endswith("Model")
    return is_kind and generates(f"{family.removesuffix('Model')}ForMaskedLM") is not None


_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")
_ENCODER_CLASSES = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification")


def check_encodes(config: Mapping[str, Any], files: Collection[str], label: str) -> None:
    """Raise NotServable if sentence-transformers cannot make an encoder of the model. ENGINE=embedding is taken at its
    word: more models than `is_encoder` knows make vectors."""
    if _MODULES_INDEX not in files:
        check_loadable(config, files, label)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # it takes 10 ms, for an error alone

    try:
        return version("transformers")
    except PackageNotFoundError:
        return "here"
