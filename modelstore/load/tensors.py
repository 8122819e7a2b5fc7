"""Bytes that arrive to tensors on a device.

On the CPU a tensor is a view into the memory that is read into, without a copy or a cast. For a GPU a few large
allocations take the blocks as they come through the ring, and tensors are views into those. Either way the tensors are
there before their bytes are, so that a model can be built from them meanwhile.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelstore.errors import BadSafetensors, DigestMismatch
from modelstore.load.device import transfer
from modelstore.load.reader import LoadedBlock, Reading, start_reading
from modelstore.load.torch_device import CudaDevices, HostDevice, address_of, check_fits, ring_bytes_for, usable_device
from modelstore.timeline import Span, Timeline
from modelstore.volume.header import Header, TensorInfo
from modelstore.volume.manifest import FileRecord
from modelstore.volume.snapshots import Snapshot

Place = Callable[[str], torch.device]

_SLAB_BYTES = 1 << 30
_ALIGNMENT = 16
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: more than the machine has may be mapped, if it is never touched


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


def load_tensors(
    snapshot: Snapshot,
    device: str | torch.device | None = None,
    *,
    reading: Reading | None = None,
    weights: Weights | None = None,
    timeline: Timeline | None = None,
    files: Sequence[FileRecord] = (),
) -> dict[str, torch.Tensor]:
    """The snapshot's tensors by their names in the checkpoint, in the storage dtype; those of a pipeline's parts after
    the name of their folder, as in "unet/conv_in.weight".

    `device` is CUDA if there is one by default; on the CPU the tensors share the memory that was read into.
    `reading`: a read of this snapshot that is in flight already; `weights`: those that `place_early` has begun with it.
    `files`: the tensors of these alone, as of modules in folders beside a model at the top.
    Raises DigestMismatch if bytes are not those published, DoesNotFit if the GPU has no room.
    """
    target = usable_device(device)
    if reading is None:
        check_fits(snapshot, [target])
        reading = start_reading(snapshot, ring_bytes=ring_bytes_for(target), files=files)
    timeline = timeline or Timeline()
    try:
        if weights is None:
            weights = Weights(reading, {"": target})
            weights.complete(snapshot, files)
            weights.start(timeline)
        else:
            weights.complete(snapshot)
        tensors = weights.wait(timeline)
    finally:
        reading.close()
    return tensors


def place_early(reading: Reading, timeline: Timeline) -> Weights | None:
    """Begin to move the arrived bytes of an unpublished snapshot to the GPU; hand the result to `load_model`.

    None if the weights stay in host memory, or if several GPUs will have to share them.
    """
    if not reading.uses_ring or torch.cuda.device_count() != 1:
        return None
    weights = Weights(reading, {"": torch.device("cuda", 0)})
    weights.start(timeline)
    return weights


@dataclass(frozen=True, slots=True)
class _Slab:
    """One allocation on a device: the bytes `begin` to `end` of a file."""

    begin: int
    end: int
    data: torch.Tensor


class Weights:
    """The tensors of a snapshot's weights, whose bytes arrive while they are there already.

    Files are prepared with `complete`, when the snapshot is known, or before that, if their bytes are to be moved,
    as the first of them arrives. `tensors`: by their names in the checkpoint. `stand_ins`: the same as CPU tensors that
    a model can be built from at once; on the CPU they are the tensors, else views of memory that is never touched.
    `has_stand_ins`: whether there are any.
    """

    def __init__(self, reading: Reading, device_map: Mapping[str, torch.device]) -> None:
        """`device_map`: devices by the names of modules, "" for all that no other one leads to."""
        self._reading = reading
        self._devices = device_map
        self._preparing = threading.Lock()
        self._headers: dict[str, Header] = {}
        self._raw: dict[str, bytes] = {}
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._error: BaseException | None = None
        self._slabs: dict[str, list[_Slab]] = {}
        self._bases: list[tuple[int, int, str]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.stand_ins: dict[str, torch.Tensor] = {}
        self.has_stand_ins = True

    def complete(self, snapshot: Snapshot, files: Sequence[FileRecord] = ()) -> None:
        """Prepare the rest of a snapshot's weights, or of these files, all of which were added to the reading. Raises
        BadSafetensors and DigestMismatch as `Reading.header` does."""
        for file in files or snapshot.weights:
            self._prepare(file.path)

    def start(self, timeline: Timeline) -> None:
        """Begin to move arriving bytes to the devices, in a thread of its own; on the CPU there is nothing to move."""
        self._began = timeline.now()
        if self._slabs or self._reading.uses_ring:
            self._thread = threading.Thread(target=self._move, name="transfer", daemon=True)
            self._thread.start()

    def wait(self, timeline: Timeline) -> dict[str, torch.Tensor]:
        """The tensors, once all bytes are in place. Raises DigestMismatch if they are not those published."""
        reading = self._reading
        if self._thread is not None:
            self._thread.join()
            if self._error is not None:
                raise self._error
            size_bytes = sum(reading.record(path).size_bytes for path in self._slabs)
            timeline.add(Span("transfer", self._began, timeline.now(), size_bytes))
        reading.wait_all()
        timeline.add(reading.as_span(timeline))
        for path, header in self._headers.items():
            if path not in self._slabs:
                self._check_header(path, reading.memory(path))
                if not self.has_stand_ins:
                    self._view_in_memory(path, header)
        return self.tensors

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a CPU tensor is a view of a stand-in."""
        return self._found(tensor) is not None

    def settled(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor on the device for a view of a stand-in; None for another tensor."""
        stand_in = self._found(tensor)
        if stand_in is None:
            return None
        path, offset = stand_in
        if path not in self._slabs:
            return tensor
        slab = next(slab for slab in self._slabs[path] if slab.begin <= offset < slab.end)
        typed = slab.data[(offset - slab.begin) % tensor.itemsize :]
        typed = typed[: typed.numel() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), (offset - slab.begin) // tensor.itemsize)

    def _found(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        address = tensor.data_ptr()
        for base, length, path in self._bases:
            if base <= address < base + length:
                return path, address - base
        return None

    def _prepare(self, path: str) -> None:
        """Make room for a file's tensors, unless that was done."""
        with self._preparing:
            if path not in self._headers:
                self._headers[path], self._raw[path] = self._reading.header(path)
                self._make_room(path, self._headers[path])

    def _make_room(self, path: str, header: Header) -> None:
        aligned = not any(_begin(header, tensor) % _dtype(tensor, path).itemsize for tensor in header.tensors)
        self.has_stand_ins = self.has_stand_ins and aligned
        devices = {self._place(tensor.name) for tensor in header.tensors}
        if devices <= {torch.device("cpu")} and not self._reading.in_ring(path):
            memory = self._reading.memory(path)
            self._bases.append((address_of(memory), len(memory), path))
            if aligned:
                self._view_in_memory(path, header)
            return
        self._slabs[path] = slabs = []
        for run in _runs(header, self._place):
            begin, end = _begin(header, run[0]), _begin(header, run[-1]) + run[-1].size_bytes
            data = torch.empty(end - begin, dtype=torch.uint8, device=self._place(run[0].name))
            slabs.append(_Slab(begin, end, data))
            for tensor in run:
                start = _begin(header, tensor) - begin
                flat = data[start : start + tensor.size_bytes].view(_dtype(tensor, path))
                self.tensors[_named(path, tensor)] = flat.view(tensor.shape)
        size_bytes = self._reading.record(path).size_bytes
        untouched = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | _NO_RESERVE))
        self._bases.append((address_of(untouched), len(untouched), path))
        if aligned:
            self.stand_ins |= {
                _named(path, tensor): _view(untouched, header, tensor, path) for tensor in header.tensors
            }

    def _place(self, name: str) -> torch.device:
        """The device for a tensor's name: that of the longest module name that leads to it, else the first."""
        while name and name not in self._devices:
            name = name.rpartition(".")[0]
        return self._devices.get(name) or next(iter(self._devices.values()))

    def _view_in_memory(self, path: str, header: Header) -> None:
        memory = self._reading.memory(path)
        for tensor in header.tensors:
            view = _view(memory, header, tensor, path)
            self.tensors[_named(path, tensor)] = self.stand_ins[_named(path, tensor)] = view

    def _move(self) -> None:
        gpus = {device for device in self._devices.values() if device.type == "cuda"}
        try:
            transfer(self._reading, CudaDevices(self.parts, gpus) if gpus else HostDevice(self.parts))
        except BaseException as error:  # handed to the waiter
            self._error = error

    def parts(self, arrival: LoadedBlock, view: memoryview) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The targets of a block's bytes: pairs of a device's bytes and the host's. Compares the header on its way."""
        self._prepare(arrival.path)
        self._check_header(arrival.path, view, arrival.offset)
        host = torch.frombuffer(view, dtype=torch.uint8)
        pairs = []
        for slab in self._slabs.get(arrival.path, ()):
            first, last = max(slab.begin, arrival.offset), min(slab.end, arrival.offset + arrival.length)
            if first < last:
                source = host[first - arrival.offset : last - arrival.offset]
                pairs.append((slab.data[first - slab.begin : last - slab.begin], source))
        return pairs

    def _check_header(self, path: str, view: memoryview, offset: int = 0) -> None:
        """Compare the header that was read ahead of its checksum with the bytes that came with one."""
        raw = self._raw[path][offset : offset + len(view)]
        if raw and view[: len(raw)] != raw:
            raise DigestMismatch(
                f"{path} of the snapshot changed while it was read: remove the snapshot and seed the model again"
            )


def _runs(header: Header, place: Place) -> list[list[TensorInfo]]:
    """The tensors that share an allocation: neighbours on one device, each aligned, of about 1 GiB together."""
    runs: list[list[TensorInfo]] = []
    for tensor in header.tensors:
        if runs:
            first = runs[-1][0]
            aligned = (tensor.begin - first.begin) % _ALIGNMENT == 0
            if aligned and place(first.name) == place(tensor.name) and tensor.end - first.begin <= _SLAB_BYTES:
                runs[-1].append(tensor)
                continue
        runs.append([tensor])
    return runs


def _named(path: str, tensor: TensorInfo) -> str:
    """A tensor's name among those of its snapshot: parts of a pipeline, in folders of their own, use the same names."""
    folder = path.rpartition("/")[0]
    return f"{folder}/{tensor.name}" if folder else tensor.name


def _begin(header: Header, tensor: TensorInfo) -> int:
    return header.data_start + tensor.begin


def _dtype(tensor: TensorInfo, path: str) -> torch.dtype:
    dtype = _TORCH.get(tensor.dtype)
    if dtype is None:
        raise BadSafetensors(f"{path} holds {tensor.dtype} tensors, which this version of torch does not know")
    return dtype


def _view(memory: memoryview, header: Header, tensor: TensorInfo, path: str) -> torch.Tensor:
    """A tensor in the memory of its file; a copy if it does not lie as its dtype wants it."""
    dtype, begin = _dtype(tensor, path), _begin(header, tensor)
    if tensor.size_bytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    buffer: Any = memory
    if begin % dtype.itemsize:
        buffer, begin = bytearray(memory[begin : begin + tensor.size_bytes]), 0
    flat = torch.frombuffer(buffer, dtype=dtype, count=tensor.size_bytes // dtype.itemsize, offset=begin)
    return flat.view(tensor.shape)
