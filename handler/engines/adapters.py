"""LoRA adapters beside a model of transformers, by peft: each row of a batch with its own, or with none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from modelstore.adapters import Adapter
from modelstore.errors import DigestMismatch, NotServable, not_installed
from modelstore.load.tensors import load_tensors

logger = logging.getLogger(__name__)

NONE = "__base__"  # peft's name for a row without an adapter
# The keys of adapter_config.json that say what an adapter is; the others are about its training, or name programs.
_KEYS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "bias", "use_rslora", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_bias"),
)


class Adapters:
    """The adapters of one model. But for `key_of` and `names` it is used from the thread that owns the model."""

    def __init__(self, model: PreTrainedModel, adapters: Iterable[Adapter]) -> None:
        """Raises NotServable if an adapter does not fit the model, or peft is not installed."""
        self._model = model
        self._peft: Any = None
        self._keys: dict[str, str] = {}
        self._made = 0
        self.current: dict[str, Adapter] = {}
        for adapter in adapters:
            self.add(adapter)

    @property
    def names(self) -> Sequence[str]:
        """Their names in jobs."""
        return list(self._keys)

    def key_of(self, name: str | None) -> str:
        """What a row is generated with: the adapter that has this name now; without a name none."""
        return NONE if name is None else self._keys[name]

    def add(self, adapter: Adapter) -> None:
        """Give a name to another adapter. Rows with the key of the one before go on with that, until it is removed."""
        key = f"a{self._made}"
        self._made += 1
        try:
            self._load(adapter, key)
        except (NotServable, DigestMismatch):
            raise
        except ModuleNotFoundError as error:
            raise not_installed(error, "adapters") from error
        except Exception as error:  # peft's are of many classes
            raise NotServable(f"the adapter {adapter.snapshot.key} does not fit the model: {error}") from error
        self._keys[adapter.name] = key
        self.current[adapter.name] = adapter

    def remove(self, key: str) -> None:
        """Free an adapter that no row has any more."""
        self._peft.set_adapter(next(iter(self._keys.values())))  # else it would warn that the active one is removed
        self._peft.delete_adapter(key)

    def generate(self, *arguments: Any, keys: Sequence[str], **options: Any) -> Any:
        """The model's `generate`, each row of the arguments with the adapter of its key."""
        return self._peft.generate(*arguments, adapter_names=list(keys), **options)

    def forward(self, *arguments: Any, keys: Sequence[str]) -> Any:
        """The model's own call."""
        return self._peft(*arguments, adapter_names=list(keys))

    def _load(self, adapter: Adapter, key: str) -> None:
        from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict

        config = _lora_config(adapter.config, str(adapter.snapshot.key))
        settings = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, lora_dropout=0.0, **config)
        tensors = load_tensors(adapter.snapshot, "cpu")
        if self._peft is None:
            self._peft = PeftModelForCausalLM(self._model, settings, adapter_name=key)
        else:
            self._peft.add_adapter(key, settings)
        loaded: Any = set_peft_model_state_dict(self._peft, tensors, adapter_name=key)
        self._peft.eval()
        if unknown := list(loaded.unexpected_keys):
            self._peft.delete_adapter(key)
            raise NotServable(f"the adapter {adapter.snapshot.key} does not fit the model: it has {unknown[0][:120]}")


def _lora_config(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    if config.get("use_dora"):
        raise NotServable(f"{label} is a DoRA adapter, which transformers cannot mix in a batch: serve it with vLLM")
    return {name: config[name] for name in _KEYS if config.get(name) is not None}
