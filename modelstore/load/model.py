"""Tensors to a model. `tests/test_layering.py` lists the files that may import torch and transformers.

The model is made by transformers itself from our tensors, so renames, fused experts, tied weights, buffers and modules
kept in fp32 are those of `from_pretrained`. It is made while the bytes are still on their way, from tensors that
are only named so far, and is whole when the last byte lands; a class whose weights are computed from others (fused
experts) is made once they are there.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel, modeling_utils

from modelstore.dtypes import DTYPES
from modelstore.errors import BadConfig, DoesNotFit, IntegrityError, NotFound, NoWeights, UsageError, WeightOverflow
from modelstore.load.model_class import MESSAGE_CHARACTERS, config_of, generation_config_of, model_class, own_class
from modelstore.load.reader import Reading, start_reading
from modelstore.load.tensors import ArrivingTensors, begin_transfer, load_tensors
from modelstore.load.torch_device import check_fits, ring_bytes_for, usable_device
from modelstore.load.transfer import Transfer
from modelstore.timeline import Timeline
from modelstore.units import one_line, size
from modelstore.volume.config_sizes import check_configs
from modelstore.volume.snapshots import Snapshot, check_code

__all__ = ["build_part", "load_model", "load_tensors", "model_class"]

logger = logging.getLogger(__name__)

DeviceMap = str | Mapping[str, str | int | torch.device]

# transformers sets torch's default dtype while it builds a model, for the whole process.
_BUILDING = threading.Lock()


def load_model(
    snapshot: Snapshot,
    device: str | torch.device | None = None,
    *,
    device_map: DeviceMap | None = None,
    reading: Reading | None = None,
    timeline: Timeline | None = None,
    trust_remote_code: bool = False,
    causal: bool = False,
    transfer: Transfer | None = None,
    while_reading: Callable[[], None] | None = None,
) -> PreTrainedModel:
    """The model that the snapshot's `config.architectures` names, in eval mode, bit for bit what
    `from_pretrained(original, dtype=<storage dtype>)` gives.

    `device`, `reading` and errors as in `load_tensors`; IntegrityError also if weights of the class are missing, or do
    not fit it; NotServable if transformers has no such class. `causal`: if `architectures` names no class of
    transformers, take the causal language model of the type instead of its plain model.
    `device_map`: parts of the model on several devices, as accelerate understands it ("auto", or devices by module).
    `trust_remote_code`: run the code that the snapshot was stored with, even of a type that transformers has; without
    it a snapshot of another type is CodeRefused.
    `transfer`: the copies of the blocks to `device`, if they have begun with `reading`.
    `while_reading` is called once, while the last bytes are on their way.
    """
    timeline = timeline or Timeline()
    if all("/" in file.path for file in snapshot.weights):
        raise NoWeights(f"{snapshot.key} is a pipeline, and no single model: load it by its path, or with load_tensors")
    trusted = snapshot.has_code and trust_remote_code
    if trust_remote_code and snapshot.lacks_code:
        logger.warning("%s is stored without its code: the class of transformers is used", snapshot.key)
    check_code(snapshot, trusted=trusted)
    target = usable_device(device)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if transfer is None:
        check_fits(snapshot, [target] if device_map is None else gpus or [target])
    is_own_reading = reading is None
    if reading is None:
        reading = start_reading(snapshot, ring_bytes=ring_bytes_for(target))
    try:
        reading.wait_small_files(snapshot)
        check_configs(snapshot.path, (file.path for file in snapshot.manifest.files), str(snapshot.key))
        transformers.utils.logging.disable_progress_bar()  # it would draw one bar a start into the worker's log
        config = config_of(snapshot, trusted=trusted)
        cls = (trusted and own_class(config, snapshot.path)) or model_class(config, str(snapshot.key), causal=causal)
        spread = None if device_map is None else _spread(device_map, cls, config, snapshot)
        devices = {name: torch.device(to) for name, to in (spread or {"": target}).items()}
        if transfer is None:
            transfer = begin_transfer(reading, devices)
        weights = ArrivingTensors(reading, transfer, timeline)
        weights.prepare(snapshot)
        with timeline.span("build"):
            model = _built_early(cls, config, snapshot, weights)
        if while_reading is not None:
            while_reading()
        tensors = weights.wait()
        if model is None:
            with timeline.span("build"):
                model = _built(cls, config, snapshot, tensors, spread or {"": target})
                _check_overflow(model, snapshot, tensors)
        else:
            _settle(model, weights, target)
            if spread is not None:
                model = accelerate.dispatch_model(model, spread)
    except BaseException:
        if is_own_reading:
            reading.close()
            if transfer is not None:
                transfer.end()
        raise
    reading.close(wait=False)
    return model


def _built(
    cls: type[PreTrainedModel],
    config: Any,
    snapshot: Snapshot,
    tensors: dict[str, torch.Tensor],
    device_map: Mapping[str, Any],
) -> PreTrainedModel:
    """The model from these tensors, as it is used. Raises IntegrityError if some are missing."""
    model = _from_tensors(cls, config, snapshot, tensors, device_map)
    model.name_or_path = model.config.name_or_path = str(snapshot.path)
    if model.can_generate():
        model.generation_config = generation_config_of(snapshot.path)
    return model.eval()


def build_part(
    cls: type[PreTrainedModel], config: Any, snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: torch.device
) -> PreTrainedModel:
    """A part of a pipeline from its tensors, which are on `device`. Raises IntegrityError if some are missing."""
    model = _from_tensors(cls, config, snapshot, tensors, {"": device})
    _check_overflow(model, snapshot, tensors)
    return model.eval()


def _from_tensors(
    cls: type[PreTrainedModel],
    config: Any,
    snapshot: Snapshot,
    tensors: dict[str, torch.Tensor],
    device_map: Mapping[str, Any],
) -> PreTrainedModel:
    on_cpu = all(torch.device(device).type == "cpu" for device in device_map.values())
    with _BUILDING, _without_allocating_ahead(), bounded_build(snapshot, len(tensors)), _foreign_errors(snapshot, cls):
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=_torch_dtype(snapshot) or "auto",
            device_map=None if on_cpu else dict(device_map),
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        if not _are_unused(model, missing):
            raise IntegrityError(
                f"{snapshot.key} lacks weights that {cls.__name__} needs ({', '.join(missing[:5])}): use another model"
            )
        logger.warning("%s lacks %s: what is made of them alone is random", snapshot.key, ", ".join(missing[:5]))
    return model


_OF_TRAINING = frozenset({"masked_spec_embed", "mask_token"})  # in the place of what a training hides from the model
_SHOW_THE_MASK = ("ForPreTraining", "ForMaskedImageModeling")


def _are_unused(model: PreTrainedModel, missing: list[str]) -> bool:
    """Whether published models often lack all of these weights, because they are made no use of: those of training, and
    an encoder's pooler, unless a class has a head on it."""
    is_trained_only = not type(model).__name__.endswith(_SHOW_THE_MASK)
    return all(
        (is_trained_only and name.rpartition(".")[2] in _OF_TRAINING)
        or (model.base_model is model and "pooler" in name.split("."))
        for name in missing
    )


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor; nothing as large is made for that."""
    least, most = tensor.aminmax()
    return max(-float(least), float(most))


def _check_overflow(model: PreTrainedModel, snapshot: Snapshot, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightOverflow if weights that were stored as they came became infinite in the dtype of the model."""
    dtype = _torch_dtype(snapshot)
    if dtype is None or not (
        snapshot.manifest.stored_unchanged or any(t.dtype == torch.float64 for t in tensors.values())
    ):
        return
    most = torch.finfo(dtype).max
    wider = (torch.float64, torch.float32, torch.bfloat16)
    beyond = {
        name
        for name, tensor in tensors.items()
        if tensor.dtype in wider and torch.finfo(tensor.dtype).max > most and tensor.numel() and _largest(tensor) > most
    }
    if beyond and any(weight.dtype == dtype and torch.isinf(weight).any() for weight in model.parameters()):
        raise WeightOverflow(
            f"{snapshot.dtype} ends at {most:g}, and {min(beyond)[:80]} of {snapshot.key} goes beyond it",
            "serve it with MODEL_DTYPE=bfloat16, or with MODEL_DTYPE=keep",
            tensors=tuple(sorted(beyond)),
        )


@contextmanager
def _foreign_errors(snapshot: Snapshot, cls: type[PreTrainedModel]) -> Iterator[None]:
    """Map the errors of transformers about a config, or about weights that are not those of its class."""
    try:
        yield
    except ImportError as error:
        raise NotFound(f"{cls.__name__} of {snapshot.key}: {one_line(str(error), MESSAGE_CHARACTERS)}") from error
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{snapshot.key} cannot be made a {cls.__name__}, which its config names: "
            f"{one_line(str(error), MESSAGE_CHARACTERS)}"
        ) from error


def _built_early(
    cls: type[PreTrainedModel], config: Any, snapshot: Snapshot, weights: ArrivingTensors
) -> PreTrainedModel | None:
    """The model from tensors whose bytes have not arrived; None if one of its weights is not simply one of those.

    Nothing may be computed from them: every operation on one is watched, and only making a view of it is let through.
    """
    if not weights.has_stand_ins:
        return None
    try:
        with _OnlyViews(weights):
            model = _built(cls, copy.deepcopy(config), snapshot, weights.stand_ins, {"": "cpu"})
    except _ValueNeeded as needed:
        logger.debug("%s is built when its bytes are there: %s needs them", snapshot.key, needed)
        return None
    loaded = model.state_dict(keep_vars=True).items()
    computed = [name for name, tensor in loaded if tensor.numel() and weights.settled(tensor) is None]
    if computed:
        logger.debug("%s is built when its bytes are there: %s is computed from them", snapshot.key, computed[0])
        return None
    return model


_BUILT_BYTES = 1 << 30  # of a tensor that a model computes for itself, a mask or a table of positions
_MADE_IN_ALL = 8  # times the largest: casts and fused experts make copies, which are gone by the end
_MOST_TENSORS = 1 << 16  # of a checkpoint whose headers have not been read yet


@contextmanager
def bounded_build(snapshot: Snapshot, tensors: int) -> Iterator[None]:
    """Let this thread build a model from a config, but no larger one than `tensors` weights and their bytes bear out.

    A larger one raises BadConfig, before it takes the memory: more modules than any architecture has for that many
    weights, or tensors in memory that are larger than all of them. See `config_sizes`, which looks at the config alone.
    """
    most_modules, most_bytes = 10_000 + 20 * tensors, max(_BUILT_BYTES, snapshot.plain_bytes)
    thread, modules = threading.get_ident(), 0

    def count(_module: Any, _name: str, _submodule: Any) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > most_modules:
                raise BadConfig(
                    f"the config of {snapshot.key} wants more layers than its {tensors} weights bear out: use another "
                    "revision"
                )

    handle = register_module_module_registration_hook(count)
    try:
        with _NoLargeTensors(snapshot, most_bytes):
            yield
    finally:
        handle.remove()


class _NoLargeTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes on the meta device first how large each new tensor in memory will be, and refuses one that is too large,
    or too many. Operations on the meta device, views and changes in place make none, and are most of a build."""

    def __init__(self, snapshot: Snapshot, most_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._snapshot = snapshot
        self._most_bytes = most_bytes
        self._made_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if all(value.alias_info is None for value in func._schema.returns) and not _on_meta(args, kwargs):
            self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        def as_meta(value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        try:
            meta_args, meta_kwargs = tree_map(as_meta, (args, kwargs))
            if "device" in meta_kwargs or not any(isinstance(value, torch.Tensor) for value in tree_leaves(args)):
                meta_kwargs["device"] = torch.device("meta")
            made = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return  # an operation that the meta device does not know is no factory of large tensors
        size_bytes = sum(value.nbytes for value in tree_leaves(made) if isinstance(value, torch.Tensor))
        self._made_bytes += size_bytes
        if size_bytes > self._most_bytes or self._made_bytes > _MADE_IN_ALL * self._most_bytes:
            expected = max(size_bytes, self._made_bytes)
            raise BadConfig(
                f"the config of {self._snapshot.key} wants a tensor of {size(expected)}, and all its weights have "
                f"{size(self._snapshot.plain_bytes)}: use another revision"
            )


def _on_meta(args: Any, kwargs: Any) -> bool:
    """Whether an operation's result takes no memory: it names the meta device, or all its tensors are there."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "meta"
    has_tensor = False
    for value in args:
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, torch.Tensor):
                has_tensor = True
                if each.device.type != "meta":
                    return False
    return has_tensor


class _ValueNeeded(BaseException):
    """Not an Exception, because transformers collects those, tensor by tensor, and goes on."""


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops at the first operation of this thread that would look at bytes which have not arrived."""

    def __init__(self, weights: ArrivingTensors) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        makes_a_view = any(
            value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns
        )
        if not makes_a_view and any(self._is_ours(value) for value in (*args, *(kwargs or {}).values())):
            raise _ValueNeeded(str(func))
        return func(*args, **(kwargs or {}))

    def _is_ours(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(self._is_ours(item) for item in value)
        return isinstance(value, torch.Tensor) and value.device.type == "cpu" and self._weights.holds(value)


def _settle(model: PreTrainedModel, weights: ArrivingTensors, device: torch.device) -> None:
    """Exchange the stand-ins for the tensors on the device, and move the tensors that the model computed by itself
    there."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device.type == "cpu":
                settled = weights.settled(tensor)
                tensor.data = tensor.data.to(device) if settled is None else settled


@contextmanager
def _without_allocating_ahead() -> Iterator[None]:
    """transformers allocates a model's size on the GPU before it loads: ours is there, and would not fit twice."""
    real = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = real


def _torch_dtype(snapshot: Snapshot) -> torch.dtype | None:
    """The dtype that the snapshot is stored in; None if it is stored as the source has it."""
    name = DTYPES[snapshot.dtype].torch_name
    return None if name is None else getattr(torch, name)


def _spread(
    device_map: DeviceMap, cls: type[PreTrainedModel], config: Any, snapshot: Snapshot
) -> dict[str, str | int | torch.device]:
    """Devices by module; if the caller leaves it to us, as accelerate balances the class's modules."""
    if not isinstance(device_map, str):
        return dict(device_map)
    if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise UsageError(f"{device_map!r} is no device map: use auto, balanced, sequential, or devices by module")
    dtype = _torch_dtype(snapshot) or torch.float16
    with _BUILDING, bounded_build(snapshot, _MOST_TENSORS), torch.device("meta"):
        skeleton = cls(copy.deepcopy(config)).to(dtype)
    skeleton.tie_weights()
    whole = list(skeleton._no_split_modules or ())
    limits = None
    if device_map != "sequential":
        limits = accelerate.utils.get_balanced_memory(
            skeleton, dtype=dtype, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0"
        )
    devices = accelerate.infer_auto_device_map(skeleton, max_memory=limits, no_split_module_classes=whole, dtype=dtype)
    if "disk" in devices.values():
        raise DoesNotFit(f"{snapshot.key} fits on no GPUs and memory that are here: use more, or a smaller model")
    return dict(devices)
