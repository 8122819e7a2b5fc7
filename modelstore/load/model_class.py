"""The class of a snapshot's model, its config and its generation config, as transformers would choose them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from modelstore.errors import BadConfig, NotFound, NotServable
from modelstore.servable import check_loadable
from modelstore.units import one_line
from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger(__name__)

MESSAGE_CHARACTERS = 500  # of an error of transformers, or of a library beside it


def config_of(snapshot: Snapshot, *, trusted: bool) -> PreTrainedConfig:
    """The snapshot's config. Raises NotServable for a type that transformers does not know, and BadConfig for a config
    that it cannot read."""
    if "config.json" not in snapshot.manifest.paths:
        raise NotServable(f"{snapshot.key} has no config.json, which names its class: load it with load_tensors")
    if not trusted:
        check_loadable(snapshot.config(), snapshot.manifest.paths, str(snapshot.key))
    try:
        return AutoConfig.from_pretrained(snapshot.path, trust_remote_code=trusted)
    except ImportError as error:
        raise NotFound(f"the config of {snapshot.key}: {one_line(str(error), MESSAGE_CHARACTERS)}") from error
    except Exception as error:  # a config's own class raises of every kind
        raise BadConfig(
            f"transformers {transformers.__version__} cannot read the config of {snapshot.key}: "
            f"{one_line(str(error), MESSAGE_CHARACTERS)}"
        ) from error


def own_class(config: Any, folder: Path) -> type[PreTrainedModel] | None:
    """The class of the snapshot's own code for the name in `config.architectures`; None if there is none."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = set(getattr(config, "architectures", None) or ())
    for reference in (getattr(config, "auto_map", None) or {}).values():
        if isinstance(reference, str) and "--" not in reference and reference.rpartition(".")[2] in name:
            cls: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder)
            return cls
    return None


def generation_config_of(folder: Path) -> GenerationConfig:
    """As `from_pretrained` finds it: its own file, else the generation keys of an older `config.json`, also if the file
    is no JSON object."""
    if (folder / "generation_config.json").is_file():
        try:
            return GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("generation_config.json is not used: %s", one_line(str(error), MESSAGE_CHARACTERS))
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _auto_class(config: Any, names: list[str]) -> Any:
    """The Auto class that the config's `auto_map` gives one of these names to; None if there is none."""
    for key, reference in (getattr(config, "auto_map", None) or {}).items():
        if isinstance(reference, str) and reference.rpartition(".")[2] in names:
            auto = getattr(transformers, key, None)
            if type(config) in getattr(auto, "_model_mapping", ()):
                return auto
    return None


def model_class(config: Any, label: str, *, causal: bool = False) -> type[PreTrainedModel]:
    """The transformers class that `config.architectures` names; else the plain model of its type, or the causal
    language model if `causal`. Raises NotServable, which names the model by `label`."""
    named = getattr(config, "architectures", None)
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list | tuple) else []
    for name in names:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    auto = _auto_class(config, names) or (transformers.AutoModelForCausalLM if causal else transformers.AutoModel)
    try:
        of_type = auto._model_mapping[type(config)]
    except KeyError as error:
        kind = "causal language model" if causal else "model"
        raise NotServable(
            f"{label}: architectures {names} in its config.json names no class of transformers "
            f"{transformers.__version__}, which has no {kind} of type {config.model_type!r} either: use another one"
        ) from error
    return of_type if isinstance(of_type, type) else of_type[0]
