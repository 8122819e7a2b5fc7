"""LoRA adapters beside a model of transformers, by peft: each row of a batch with its own, or with none.

An adapter is foreign data, so peft gets nothing of its config but numbers: the layers and ranks are told from its
tensors, each of which has to fit a linear layer of the model. Whatever else an adapter can hold (whole layers, biases,
tokens of its own) would change the answers of others, and is refused.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from modelstore.adapters import Adapter
from modelstore.errors import NotServable, not_installed
from modelstore.load.tensors import load_tensors

logger = logging.getLogger(__name__)

NONE = "__base__"  # peft's name for a row without an adapter
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
_PLAIN = re.compile(r"[\w.]+")
# Keys of adapter_config.json that make an adapter something else than products of two matrices beside linear layers
_OTHER_KINDS = (
    *("use_dora", "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("use_qalora", "modules_to_save", "lora_bias"),
)
_INITIAL = (None, True, False, "gaussian")  # values of init_lora_weights that leave the model's own weights alone


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that was read, and fits the model. `settings`: peft's, but for its own names; `tensors`: by the names
    that they have in its file."""

    adapter: Adapter
    settings: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class Adapters:
    """The adapters of one model. `prepare`, `key_of` and `names` are for any thread, the rest for that which owns the
    model."""

    def __init__(self, model: PreTrainedModel, adapters: Iterable[Adapter]) -> None:
        """Raises NotServable if an adapter does not fit the model, or peft is not installed."""
        self._model = model
        self._peft: Any = None
        self._layers: list[Any] = []
        self._keys: dict[str, str] = {}
        self._made = 0
        self.current: dict[str, Adapter] = {}
        for adapter in adapters:
            self.add(self.prepare(adapter))

    @property
    def names(self) -> Sequence[str]:
        """Their names in jobs."""
        return list(self._keys)

    def key_of(self, name: str | None) -> str:
        """What a row is generated with: the adapter that has this name now; without a name none."""
        return NONE if name is None else self._keys[name]

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """Read an adapter, and compare it with the model. Raises NotServable, DigestMismatch."""
        label = str(adapter.snapshot.key)
        tensors = load_tensors(adapter.snapshot, "cpu")
        ranks = _ranks(tensors, self._model, label)
        return PreparedAdapter(adapter, _settings(adapter.config, ranks, label), tensors)

    def add(self, prepared: PreparedAdapter) -> None:
        """Give a name to another adapter. Rows with the key of the one before go on with that, until it is removed."""
        adapter, key = prepared.adapter, f"a{self._made}"
        self._made += 1
        try:
            self._load(prepared, key)
        except (NotServable, MemoryError, torch.OutOfMemoryError):
            self._discard(key)
            raise
        except ModuleNotFoundError as error:
            raise not_installed(error, "adapters") from error
        except Exception as error:  # peft's are of many classes
            self._discard(key)
            raise NotServable(f"the adapter {adapter.snapshot.key} does not fit the model: {error}") from error
        self._keys[adapter.name] = key
        self.current[adapter.name] = adapter

    def remove(self, key: str) -> None:
        """Free an adapter that no row has any more."""
        self._peft.set_adapter(next(iter(self._keys.values())))  # else it would warn that the active one is removed
        self._peft.delete_adapter(key)

    def generate(self, *arguments: Any, keys: Sequence[str], **options: Any) -> Any:
        """The model's `generate`, each row of the arguments with the adapter of its key."""
        with self._own_hooks():
            return self._peft.generate(*arguments, adapter_names=list(keys), **options)

    def forward(self, *arguments: Any, keys: Sequence[str]) -> Any:
        """The model's own call."""
        with self._own_hooks():
            return self._peft(*arguments, adapter_names=list(keys))

    def _load(self, prepared: PreparedAdapter, key: str) -> None:
        from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        settings = LoraConfig(task_type="CAUSAL_LM", inference_mode=True, lora_dropout=0.0, **prepared.settings)
        if self._peft is None:
            self._peft = PeftModelForCausalLM(self._model, settings, adapter_name=key)
        else:
            self._peft.add_adapter(key, settings)
        loaded: Any = set_peft_model_state_dict(self._peft, dict(prepared.tensors), adapter_name=key)
        missing = [name for name in loaded.missing_keys if f".{key}." in name]
        if problems := [*loaded.unexpected_keys, *missing]:
            raise NotServable(
                f"the adapter {prepared.adapter.snapshot.key} does not fit the model: {problems[0][:120]}"
            )
        self._peft.eval()
        self._layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
        with torch.inference_mode():  # layers of some models, and of some quantizations, take no names of adapters
            self.forward(torch.ones((2, 3), dtype=torch.long, device=self._model.device), keys=[key, NONE])

    def _discard(self, key: str) -> None:
        """Take out what was added of an adapter that cannot be used."""
        with suppress(Exception):
            self._peft.delete_adapter(key)

    @contextmanager
    def _own_hooks(self) -> Iterator[None]:
        """Take away the hooks that peft leaves in its layers if a call fails."""
        before = [set(layer._forward_pre_hooks) for layer in self._layers]
        try:
            yield
        except BaseException:
            for layer, hooks in zip(self._layers, before, strict=True):
                for hook in set(layer._forward_pre_hooks) - hooks:
                    del layer._forward_pre_hooks[hook]
                    layer._forward_pre_hooks_with_kwargs.pop(hook, None)
            raise


def _ranks(tensors: Mapping[str, torch.Tensor], model: PreTrainedModel, label: str) -> dict[str, int]:
    """The rank of an adapter's matrices, by the module that they are beside. Raises NotServable unless each has two, of
    its shapes."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.dim() != 2:
            raise NotServable(
                f"{label} has {name[:120]!r}, and no plain LoRA of linear layers alone: serve it with vLLM"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    modules = dict(model.named_modules())
    ranks = {}
    for module, pair in sides.items():
        layer: Any = modules.get(module)
        layer = getattr(layer, "base_layer", layer)
        if pair.keys() != {"A", "B"} or layer is None or not hasattr(layer, "weight"):
            raise NotServable(f"the adapter {label} does not fit the model: {module[:120]}")
        rank, inputs = pair["A"].shape
        weight = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        outputs, same_rank = pair["B"].shape
        if same_rank != rank or (None not in weight and weight != (inputs, outputs)):
            raise NotServable(f"the adapter {label} does not fit the model: {module[:120]} has other sizes")
        ranks[module] = rank
    if not ranks:
        raise NotServable(f"{label} has no weights: name another adapter")
    return ranks


def _settings(config: Mapping[str, Any], ranks: Mapping[str, int], label: str) -> dict[str, Any]:
    """peft's settings for these modules. Raises NotServable for an adapter of another kind."""
    other = [name for name in _OTHER_KINDS if config.get(name)]
    other += ["bias"] if config.get("bias") not in (None, "none") else []
    other += ["init_lora_weights"] if config.get("init_lora_weights") not in _INITIAL else []
    if other:
        raise NotServable(f"{label} is no plain LoRA adapter ({other[0]}), and cannot be mixed in a batch: use vLLM")
    default = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {module: _alpha(config, module, label) for module in ranks if config.get("alpha_pattern")}
    return {
        "r": default,
        "lora_alpha": _alpha(config, "", label),
        "use_rslora": config.get("use_rslora") is True,
        "fan_in_fan_out": config.get("fan_in_fan_out") is True,
        "target_modules": list(ranks),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items() if rank != default},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items()},
    }


def _alpha(config: Mapping[str, Any], module: str, label: str) -> float:
    """The factor of a module's product; of a module without a name, that of most."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern")
    for name, other in patterns.items() if isinstance(patterns, dict) else ():
        if not _PLAIN.fullmatch(name):
            raise NotServable(f"{label} has the pattern {name[:80]!r} in its alpha_pattern: serve it with vLLM")
        if module == name or module.endswith(f".{name}"):
            alpha = other
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise NotServable(f"{label} has no usable lora_alpha ({str(alpha)[:40]}): name another adapter")
    return alpha
