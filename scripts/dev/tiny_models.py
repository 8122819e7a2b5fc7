"""Every model class of transformers, tiny: a configuration that is small and has its optional parts switched on.

No list of architectures is kept here. A configuration is shrunk by the names of its fields, as far as the class can
still be built: layers, vocabularies and experts to a few, widths and heads by one common factor, so that the size of a
head and the sections of a rotary embedding stay those of the original.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 120_000_000

_DEMANDED: dict[str, dict[str, Any]] = {  # by classes that their own default configurations cannot build
    "BeitForSemanticSegmentation": {"out_indices": [1, 2, 3, 4]},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)
_POSITIONS = ("rotary", "relative", "relative_key", "relative_key_query", "rope", "sinusoidal")

_LAYERS = re.compile(r"(layers?|depths?|blocks?|num_stages|n_layer|num_hidden_groups)$")
_LAYER_WORDS = re.compile(r"^(num|n|number|encoder|decoder|depth)|_depth|depths?$")
_COUNTS = re.compile(
    r"vocab|^(num|n)_(.*_)?experts$|num_queries|max_.*position|n_positions|codebook_size|num_embeddings"
)
_MOST_OF_A_COUNT = (
    (re.compile(r"vocab|max_.*position|n_positions|codebook_size|num_embeddings"), 256),
    (re.compile(r"^(num|n)_(.*_)?experts$|num_queries"), 8),
)
_HEADS = re.compile(r"(^|_)heads?$|(^|_)n_heads?(_|$)|num_(attention|key_value|q|kv)_heads|attention_heads$")
_DENSE = re.compile(r"dense_(layers|replace)$|moe_layer_start")
_NO_COUNT_OF_HEADS = re.compile(r"dim|d_head|kv|key_value")
_WIDTH = re.compile(
    r"(^|_)(size|dim|dims|width|channels?|d_model|d_ff|inner|rank|embd|features)$|^d_|hidden|width|_dim_"
)
_NO_WIDTH = re.compile(
    r"vocab|image|patch|kernel|head|window|chunk|stride|tubelet|crop|grid|batch|num_channels|^in_c|rope|rotary|qk_|conv_|_group|cache|state|block_size|max_|merge|queries|in_channels|audio_ch|bits|factor|input|sampl"
)
_NO_OPTION = re.compile(
    r"cache|output_|return|torchscript|tie_|bfloat16|is_decoder|cross_attention|kernel|checkpoint|is_encoder_decoder|"
    r"pruned|flash|pretrained|timm|fast|low_cpu|fp16|stable_embedding|remove_|legacy|eager|quant|skip_|router_logits|"
    r"backbone|mup|keras|onnx|only|is_composition|dummy"
)


def loadable_classes() -> list[str]:
    """The names of the classes that a checkpoint's `architectures` may give: all that the Auto classes know."""
    names: set[str] = set()
    for mapping in (
        value
        for name, value in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    ):
        for entry in mapping.values():
            names |= {entry} if isinstance(entry, str) else set(filter(None, entry))
    return sorted(names)


def class_named(name: str) -> type[PreTrainedModel]:
    """The class. Raises ImportError if its module needs a package that is not here, AttributeError if there is none."""
    cls = getattr(transformers, name)
    importlib.import_module(cls.__module__)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ImportError(f"{name} needs a package that is not installed")
    return cls


def tiny_configs(cls: type[PreTrainedModel]) -> Iterator[PreTrainedConfig]:
    """Small configurations that `cls` can be built from, with as many options on as it takes.

    The first is the configuration with its options; more follow for each kind of position embedding. Raises the error
    of transformers if the class cannot be built, and ValueError if it is not small then.
    """
    config = _with_options(cls, _smallest(cls))
    yield config
    for name in ("position_embeddings_type", "position_embedding_type"):
        for kind in _POSITIONS if getattr(config, name, None) else ():
            other = _changed(config, {name: kind})
            if kind != getattr(config, name) and fits(cls, other):
                yield other


def with_another_rope(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The configuration with rotary embeddings of another kind, one of four by the name of the class; None if it has
    none, or cannot be built with them."""
    kind = _ROPES[zlib.crc32(cls.__name__.encode()) % len(_ROPES)]
    other, changed = copy.deepcopy(config), False
    for part in _parts(other):
        rope = vars(part).get("rope_parameters")
        if not isinstance(rope, dict):
            continue
        if rope.get("rope_type") == "default":
            _set(part, "rope_parameters", {**rope, **kind})
            changed = True
        elif isinstance(rope.get("full_attention"), dict):  # one for each type of layer
            _set(part, "rope_parameters", {**rope, "full_attention": {**rope["full_attention"], **kind}})
            changed = True
    return other if changed and fits(cls, other) else None


def fits(cls: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether `cls` can be built from `config`, once it was written and read, and is small."""
    try:
        return parameters_of(built_on_meta(cls, config)) <= MOST_PARAMETERS
    except Exception:  # transformers raises of every kind for a configuration that does not fit
        return False


def built_on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The class on the meta device, from a configuration as `config.json` would hold it."""
    with torch.device("meta"):
        return cls(type(config).from_dict(copy.deepcopy(config.to_dict())))


def parameters_of(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())


def _smallest(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The smallest configuration that `cls` can be built from. Raises the last error if there is none."""
    error: Exception = ValueError("no configuration")
    default = _default(cls)
    for name, value in _DEMANDED.get(cls.__name__, {}).items():
        _set(default, name, value)
    _add_missing_fields(cls, default)
    for config in (default, _completed(default)):
        for factor, counts in itertools.product(("own", "common", "none"), (True, False)):
            shrunk = _shrunk(copy.deepcopy(config), factor, counts=counts)
            try:
                size = parameters_of(built_on_meta(cls, shrunk))
            except Exception as problem:
                error = problem
                continue
            if size <= MOST_PARAMETERS:
                return shrunk
    for config in (default, _completed(default)):
        try:
            built_on_meta(cls, config)
        except Exception as problem:
            error = problem
            continue
        shrunk = _shrunk_by_fields(cls, config)
        size = parameters_of(built_on_meta(cls, shrunk))
        if size <= MOST_PARAMETERS:
            return shrunk
        error = ValueError(f"its smallest configuration here has {size / 1e6:.0f} M parameters")
    raise error


def _shrunk_by_fields(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with every field smaller that can be so by itself, for classes whose fields bind each other."""

    def builds(other: PreTrainedConfig) -> bool:
        try:
            built_on_meta(cls, other)
        except Exception:
            return False
        return True

    for index, part in list(enumerate(_parts(config))) * 2:
        factor = _factor([part])
        names = [name for name, value in vars(part).items() if not name.startswith("_")]
        names.sort(key=lambda name: not _LAYERS.search(name))
        for name in names:
            value = vars(list(_parts(config))[index]).get(name)
            tries = [_smaller_value(name, value, divisor, counts=True) for divisor in (factor, 8, 4, 2)]
            if type(value) is int and tries[0] == 2 < value:
                tries += [layers for layers in (4, 6, 8, 12) if layers < value]
            for new in tries:
                if new is not value and new != value and builds(other := _changed(config, {name: new}, index)):
                    config = other
                    break
    return config


def _add_missing_fields(cls: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Give a configuration the fields that its class reads and its own class does not define."""
    for _ in range(5):
        try:
            built_on_meta(cls, config)
        except AttributeError as error:
            owners = [part for part in _parts(config) if type(part) is type(error.obj)]
            if not owners or error.name is None:
                return
            for part in owners:
                _set(part, error.name, 0.0 if re.search("rate|drop|prob", error.name) else 64)
        except Exception:
            return
        else:
            return


def _completed(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with values for the fields that its class leaves open."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        heads = vars(part).get("num_attention_heads")
        layers = vars(part).get("num_hidden_layers")
        layers = layers if type(layers) is int else 2
        for name, value in {
            "num_key_value_heads": heads,
            "head_dim": 16,
            "vocab_size": 160,
            "pad_token_id": 0,
            "layer_types": [("full_attention", "conv")[i % 2] for i in range(layers)],
            "mlp_layer_types": [("dense", "sparse")[i % 2] for i in range(layers)],
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "deepstack_layer_map": [],
            "token_budget": 8,
            "compress_ratio": 4,
            "prediction_length": 4,
            "context_length": 8,
            "is_decoder": True,
            "out_indices": [1],
            "vocabulary_map": {"<image>": 1},
            "add_adapter": True,
        }.items():
            if name in vars(part) and vars(part)[name] in (None, False):
                _set(part, name, value)
    return config


def _default(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The default configuration, with defaults for the parts that have none."""
    try:
        return cls.config_class()
    except Exception:
        config_class = cls.config_class
        parts = getattr(config_class, "sub_configs", None) or {}
        known = {
            name: part()
            for name, part in parts.items()
            if isinstance(part, type) and part is not transformers.AutoConfig
        }
        if "encoder" in str(config_class.__init__.__doc__) or "EncoderDecoder" in config_class.__name__:
            first = transformers.ViTConfig() if "Vision" in config_class.__name__ else transformers.BertConfig()
            first = transformers.Wav2Vec2Config() if "Speech" in config_class.__name__ else first
            return config_class.from_encoder_decoder_configs(
                first, transformers.BertConfig(is_decoder=True, add_cross_attention=True)
            )
        return config_class(**known)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, PreTrainedConfig):
                yield from _parts(each)


def _shrunk(config: PreTrainedConfig, factor: str, *, counts: bool) -> PreTrainedConfig:
    common = _factor(list(_parts(config)))
    for part in _parts(config):
        divisor = {"own": _factor([part]), "common": common, "none": 1}[factor]
        for name, value in list(vars(part).items()):
            new = value if name.startswith("_") else _smaller_value(name, value, divisor, counts=counts)
            if new is not value and new != value:
                _set(part, name, new)
        count = vars(part).get("num_hidden_layers")
        if isinstance(count, int):
            for name, value in list(vars(part).items()):
                if isinstance(value, list | tuple) and len(value) > count and ("layer" in name or "types" in name):
                    _set(part, name, _some_of_each(list(value), count))
                if type(value) is int and value >= count and _DENSE.search(name):
                    _set(part, name, count - 1)  # the layers before the first one with experts
        vocab, pad = vars(part).get("vocab_size"), vars(part).get("pad_token_id")
        if isinstance(vocab, int) and isinstance(pad, int) and pad >= vocab:
            _set(part, "pad_token_id", 1)
    return config


def _smaller_value(name: str, value: Any, divisor: int, *, counts: bool) -> Any:
    if isinstance(value, list | tuple) and value and all(type(each) is int for each in value):
        return type(value)(_smaller(name, each, divisor, counts=counts) for each in value)
    return _smaller(name, value, divisor, counts=counts) if type(value) is int else value


def _some_of_each(values: list[Any], count: int) -> list[Any]:
    """`count` of the values, with each kind among them if there is room."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return (kinds + values)[:count] if all(isinstance(v, str | int) for v in values) else values[:count]


def _factor(parts: list[PreTrainedConfig]) -> int:
    """The factor that the head counts of these configurations have in common."""
    counts = [
        value
        for part in parts
        for name, value in vars(part).items()
        if type(value) is int and value > 1 and _HEADS.search(name) and not _NO_COUNT_OF_HEADS.search(name)
    ]
    return math.gcd(*counts) if counts else 8


def _smaller(name: str, value: int, divisor: int, *, counts: bool) -> int:
    if _LAYERS.search(name) and _LAYER_WORDS.search(name) and value > 2:
        return 2
    if counts:
        for pattern, most in _MOST_OF_A_COUNT:
            if pattern.search(name) and value > most:
                return most
    if _HEADS.search(name) and "d_head" not in name and value > 1 and (value % divisor == 0 or value < divisor):
        return max(1, value // divisor)
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 32 and value % divisor == 0:
        return value // divisor
    return value


def _with_options(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with every option switched on that the class can be built with."""
    for index, part in enumerate(_parts(config)):
        names = [n for n, v in vars(part).items() if v is False and not n.startswith("_") and not _NO_OPTION.search(n)]
        for name in names:
            if fits(cls, other := _changed(config, {name: True}, index)):
                config = other
    return config


def _changed(config: PreTrainedConfig, values: dict[str, Any], part: int = 0) -> PreTrainedConfig:
    """A copy with other values in one of its parts."""
    other = copy.deepcopy(config)
    for name, value in values.items():
        _set(list(_parts(other))[part], name, value)
    return other


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a configuration that checks each value by itself, before the others have followed
        config.__dict__[name] = value
