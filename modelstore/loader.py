"""Buffers to tensors on the device, tensors to a model: the only importer of torch and transformers in the package.

On the CPU a tensor is a view into the read buffer, without a copy or a cast. The model is made by transformers itself
from those tensors, on the meta device, so renames, fused experts, tied weights, buffers and modules kept in fp32 are
what `from_pretrained` makes them.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from modelstore.catalog import Snapshot
from modelstore.errors import BadSafetensors, CodeRefused, IntegrityError, NoWeights, UsageError
from modelstore.header import LENGTH_BYTES, header_length, parse_header
from modelstore.reader import Reading, start_reading
from modelstore.timeline import Span, Timeline

logger = logging.getLogger(__name__)

# transformers sets torch's default dtype while it builds a model, for the whole process.
_BUILDING = threading.Lock()

_TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):
    _TORCH["F8_E8M0"] = torch.float8_e8m0fnu


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or where none is named CUDA if there is one, else the CPU. Raises UsageError where it is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{str(device)!r} is not a device: use cuda, cuda:0 or cpu") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"this machine has no {target}: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    return target


def load_tensors(
    snapshot: Snapshot,
    device: str | torch.device | None = None,
    *,
    reading: Reading | None = None,
    timeline: Timeline | None = None,
) -> dict[str, torch.Tensor]:
    """The snapshot's tensors by their names in the checkpoint, in the storage dtype.

    `device` is CUDA where there is one by default; on the CPU the tensors share the read buffer. `reading`: a read of
    this snapshot that is in flight already. Raises DigestMismatch where bytes are not what was published.
    """
    target = usable_device(device)
    timeline = timeline or Timeline()
    if reading is None:
        reading = start_reading(snapshot)
    tensors: dict[str, torch.Tensor] = {}
    for file in snapshot.weights:
        tensors |= _tensors_of(reading.wait(file.path), str(snapshot.path / file.path))
    reading.wait_all()
    ended = reading.ended or reading.began
    timeline.add(Span("read", reading.began - timeline.began, ended - timeline.began, reading.size_bytes))
    if target.type != "cpu":
        with timeline.span("transfer") as span:
            span.size_bytes = reading.size_bytes
            tensors = {name: tensor.to(target) for name, tensor in tensors.items()}
    return tensors


def load_model(
    snapshot: Snapshot,
    device: str | torch.device | None = None,
    *,
    reading: Reading | None = None,
    timeline: Timeline | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model that the snapshot's `config.architectures` names, in eval mode, bit for bit what
    `from_pretrained(original, dtype=<storage dtype>)` gives.

    `device`, `reading` and errors as in `load_tensors`; IntegrityError also where weights of the class are missing.
    `trust_remote_code`: run the code that the snapshot was stored with; without it such a snapshot is CodeRefused.
    """
    target = usable_device(device)
    timeline = timeline or Timeline()
    trusted = snapshot.manifest.remote_code and trust_remote_code
    if snapshot.manifest.remote_code and not trusted:
        raise CodeRefused(
            f"{snapshot.key} was stored with code of its own: set MODELSTORE_TRUST_REMOTE_CODE=1 to run it here"
        )
    reading = reading or start_reading(snapshot)
    for file in reading.files[: -len(snapshot.weights)]:
        reading.wait(file.path)  # the config is parsed only once its bytes are known to be right
    transformers.utils.logging.disable_progress_bar()  # it would draw one bar a start into the worker's log
    config = AutoConfig.from_pretrained(snapshot.path, trust_remote_code=trusted)
    cls = _own_class(config, snapshot.path) if trusted else model_class(config)
    tensors = load_tensors(snapshot, target, reading=reading, timeline=timeline)
    with timeline.span("build"), _BUILDING:
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype="auto" if snapshot.dtype == "keep" else getattr(torch, snapshot.dtype),
            device_map=None if target.type == "cpu" else {"": target},
            output_loading_info=True,
        )
        if info["missing_keys"]:
            names = ", ".join(sorted(info["missing_keys"])[:5])
            raise IntegrityError(f"{snapshot.key} lacks weights that {cls.__name__} needs ({names}): use another model")
        model.name_or_path = model.config.name_or_path = str(snapshot.path)
        if model.can_generate():
            model.generation_config = _generation_config(snapshot.path)
        model.eval()
    return model


def _own_class(config: Any, folder: Path) -> type[PreTrainedModel]:
    """The class that the snapshot's own code brings for what `config.architectures` names, else transformers' own."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    wanted = set(getattr(config, "architectures", None) or ())
    for reference in (getattr(config, "auto_map", None) or {}).values():
        if isinstance(reference, str) and "--" not in reference and reference.rpartition(".")[2] in wanted:
            cls: type[PreTrainedModel] = get_class_from_dynamic_module(reference, folder)
            return cls
    return model_class(config)


def _generation_config(folder: Path) -> GenerationConfig:
    """As `from_pretrained` finds it: its own file, else the generation keys of an older `config.json`."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def model_class(config: Any) -> type[PreTrainedModel]:
    """The transformers class that `config.architectures` names, else the plain model of its type."""
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    try:
        found = transformers.AutoModel._model_mapping[type(config)]
    except KeyError as error:
        raise NoWeights(
            f"transformers {transformers.__version__} has no class for {config.architectures}: upgrade transformers"
        ) from error
    return found if isinstance(found, type) else found[0]


def _tensors_of(data: memoryview, where: str) -> dict[str, torch.Tensor]:
    """Views of a safetensors file in memory."""
    length = header_length(bytes(data[:LENGTH_BYTES]), file_bytes=len(data), where=where)
    header = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], file_bytes=len(data), where=where)
    tensors = {}
    for tensor in header.tensors:
        dtype = _TORCH.get(tensor.dtype)
        if dtype is None:
            raise BadSafetensors(f"{where} holds {tensor.dtype} tensors, which this version of torch does not know")
        begin = header.data_start + tensor.begin
        if tensor.size_bytes == 0:
            tensors[tensor.name] = torch.empty(tensor.shape, dtype=dtype)
            continue
        buffer: Any = data
        if begin % dtype.itemsize:
            buffer, begin = bytearray(data[begin : begin + tensor.size_bytes]), 0
        flat = torch.frombuffer(buffer, dtype=dtype, count=tensor.size_bytes // dtype.itemsize, offset=begin)
        tensors[tensor.name] = flat.view(tensor.shape)
    return tensors
