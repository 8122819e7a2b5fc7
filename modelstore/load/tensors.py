"""Bytes that arrive to tensors on a device.

On the CPU a tensor is a view into the memory that is read into, without a copy or a cast. For a GPU a few large
allocations take the blocks as they come through the ring, and tensors are views into those. Either way the tensors are
there before their bytes are, so that a model can be built from them meanwhile.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence

import torch

from modelstore.load.device import open_devices
from modelstore.load.reader import Reading, start_reading
from modelstore.load.torch_device import check_fits, device_name, ring_bytes_for, tensor_of, usable_device
from modelstore.load.transfer import Transfer, address_of, check_header, device_by_module
from modelstore.load.views import dtype_of, view_of
from modelstore.timeline import Timeline
from modelstore.volume.header import Header, TensorInfo
from modelstore.volume.manifest import FileRecord
from modelstore.volume.snapshots import Snapshot

_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: more than the machine has may be mapped, if it is never touched


def load_tensors(
    snapshot: Snapshot,
    device: str | torch.device | None = None,
    *,
    reading: Reading | None = None,
    transfer: Transfer | None = None,
    timeline: Timeline | None = None,
    files: Sequence[FileRecord] = (),
) -> dict[str, torch.Tensor]:
    """The snapshot's tensors by their names in the checkpoint, in the storage dtype; those of a pipeline's parts after
    the name of their folder, as in "unet/conv_in.weight".

    `device` is CUDA if there is one by default; on the CPU the tensors share the memory that was read into.
    `reading`: a read of this snapshot that is in flight already; `transfer`: the copies of its blocks to the GPU, if
    they have begun. `files`: the tensors of these alone, as of modules in folders beside a model at the top.
    Raises DigestMismatch if bytes are not those published, DoesNotFit if the GPU has no room.
    """
    target = usable_device(device)
    if reading is None:
        check_fits(snapshot, [target])
        reading = start_reading(snapshot, ring_bytes=ring_bytes_for(target), files=files)
    timeline = timeline or Timeline()
    if transfer is None:
        transfer = begin_transfer(reading, {"": target})
    try:
        weights = ArrivingTensors(reading, transfer, timeline)
        weights.prepare(snapshot, files)
        return weights.wait()
    finally:
        reading.close()
        if transfer is not None:
            transfer.end()


def begin_transfer(reading: Reading, device_map: Mapping[str, torch.device]) -> Transfer | None:
    """Begin to copy the blocks of a reading to devices, by the names of modules, "" for all that no other one leads to;
    None if the bytes stay where they are."""
    devices = {name: device_name(device) for name, device in device_map.items()}
    if not reading.uses_ring and set(devices.values()) == {"cpu"}:
        return None
    return Transfer(reading, lambda: open_devices(devices.values()), device_by_module(devices))


class ArrivingTensors:
    """The tensors of a snapshot's weights. The tensors exist before their bytes arrive.

    Files are prepared with `prepare`, when the snapshot is known. `tensors`: by their names in the checkpoint.
    `stand_ins`: the same as CPU tensors that a model can be built from at once; on the CPU they are the tensors, else
    views of memory that is never touched. `has_stand_ins`: whether there are any.
    """

    def __init__(self, reading: Reading, transfer: Transfer | None, timeline: Timeline) -> None:
        """`transfer`: the copies of the reading's blocks to devices; None if the bytes stay where they are."""
        self._reading = reading
        self._transfer = transfer
        self._timeline = timeline
        self._headers: dict[str, Header] = {}
        self._raw: dict[str, bytes] = {}
        self._slabs: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
        self._bases: list[tuple[int, int, str]] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.stand_ins: dict[str, torch.Tensor] = {}
        self.has_stand_ins = True

    def prepare(self, snapshot: Snapshot, files: Sequence[FileRecord] = ()) -> None:
        """Prepare a snapshot's weights, or these files, all of which were added to the reading. Raises as
        `Transfer.prepare`."""
        for file in files or snapshot.weights:
            if self._transfer is not None:
                self._take_slabs(file.path, self._transfer)
            else:
                self._headers[file.path], self._raw[file.path] = self._reading.header(file.path)
            self._make_stand_ins(file.path, self._headers[file.path])

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors, once all bytes are in place. Raises DigestMismatch if they are not those published."""
        reading = self._reading
        if self._transfer is not None:
            self._transfer.wait()
            self._timeline.add(self._transfer.as_span(self._timeline))
        reading.wait_all()
        self._timeline.add(reading.as_span(self._timeline))
        for path, raw in self._raw.items():
            check_header(path, raw, reading.memory(path))
            if not self.has_stand_ins:
                self._view_in_memory(path, self._headers[path])
        return self.tensors

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a CPU tensor is a view of a stand-in."""
        return self._base_of(tensor) is not None

    def settled(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor on the device for a view of a stand-in; None for another tensor."""
        stand_in = self._base_of(tensor)
        if stand_in is None:
            return None
        path, offset = stand_in
        if path not in self._slabs:
            return tensor
        begin, data = next((begin, data) for begin, end, data in self._slabs[path] if begin <= offset < end)
        typed = data[(offset - begin) % tensor.itemsize :]
        typed = typed[: typed.numel() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), (offset - begin) // tensor.itemsize)

    def _base_of(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """The file, and the byte of it, that a tensor's memory stands for."""
        address = tensor.data_ptr()
        for base, length, path in self._bases:
            if base <= address < base + length:
                return path, address - base
        return None

    def _take_slabs(self, path: str, transfer: Transfer) -> None:
        """The tensors of a file as views of the memory that the transfer fills."""
        transfer.prepare(path)
        header = self._headers[path] = transfer.headers[path]
        self._slabs[path] = []
        for slab in transfer.slabs[path]:
            data = tensor_of(slab.memory)
            self._slabs[path].append((slab.begin, slab.end, data))
            for tensor in slab.tensors:
                begin = _begin(header, tensor) - slab.begin
                flat = data[begin : begin + tensor.size_bytes].view(dtype_of(tensor, path))
                self.tensors[_named(path, tensor)] = flat.view(tensor.shape)

    def _make_stand_ins(self, path: str, header: Header) -> None:
        aligned = not any(_begin(header, tensor) % dtype_of(tensor, path).itemsize for tensor in header.tensors)
        self.has_stand_ins = self.has_stand_ins and aligned
        if path not in self._slabs:
            memory = self._reading.memory(path)
            self._bases.append((address_of(memory), len(memory), path))
            if aligned:
                self._view_in_memory(path, header)
            return
        size_bytes = self._reading.record(path).size_bytes
        untouched = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | _NO_RESERVE))
        self._bases.append((address_of(untouched), len(untouched), path))
        if aligned:
            self.stand_ins |= {
                _named(path, tensor): view_of(untouched, header, tensor, path) for tensor in header.tensors
            }

    def _view_in_memory(self, path: str, header: Header) -> None:
        memory = self._reading.memory(path)
        for tensor in header.tensors:
            view = view_of(memory, header, tensor, path)
            self.tensors[_named(path, tensor)] = self.stand_ins[_named(path, tensor)] = view


def _named(path: str, tensor: TensorInfo) -> str:
    """A tensor's name among those of its snapshot: parts of a pipeline, in folders of their own, use the same names."""
    folder = path.rpartition("/")[0]
    return f"{folder}/{tensor.name}" if folder else tensor.name


def _begin(header: Header, tensor: TensorInfo) -> int:
    return header.data_start + tensor.begin
