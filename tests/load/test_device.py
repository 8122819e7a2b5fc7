"""GPUs by their driver, against a libcuda whose memory is the host's: order, lifetime, and every call refused once."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from modelstore import ModelStore, load_model, load_tensors
from modelstore.errors import DeviceFailed, DigestMismatch, DoesNotFit
from modelstore.load.device import GpuMemory, Gpus, open_devices
from modelstore.load.reader import Reading, start_reading
from modelstore.load.tensors import ArrivingTensors, begin_transfer
from modelstore.load.torch_device import tensor_of
from modelstore.load.transfer import HostMemory, Part, Transfer
from modelstore.timeline import Timeline
from modelstore.volume.snapshots import Snapshot
from tests.support.fake_cuda import FakeCuda
from tests.support.models import MODELS, assert_equal, save
from tests.support.readings import MB, start, weights_file

CALLS = [
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxPushCurrent_v2",
    "cuMemAlloc_v2",
    "cuMemHostRegister_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuStreamCreate",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
]


@pytest.fixture
def snapshot(store: ModelStore, tmp_path: Path) -> Snapshot:
    save(MODELS["llama"](), tmp_path / "original", shards=True)
    return store.ensure(f"file://{tmp_path}/original")


def on_gpus(reading: Reading, *numbers: int) -> Transfer:
    return Transfer(reading, lambda: Gpus(numbers or (0,)), lambda _name: "cuda:0")


def test_tensors_are_the_memory_of_the_gpu_and_keep_it(fake_cuda: FakeCuda, snapshot: Snapshot) -> None:
    reading = start_reading(snapshot, ring_bytes=1)
    transfer = on_gpus(reading)
    tensors = load_tensors(snapshot, "cpu", reading=reading, transfer=transfer)
    for name, tensor in load_tensors(snapshot, "cpu").items():
        assert torch.equal(tensors[name], tensor), name
    assert fake_cuda.state.bytes_copied - mmap.PAGESIZE == sum(tensor.nbytes for tensor in tensors.values())
    del transfer, reading, tensor
    gc.collect()
    assert fake_cuda.state.allocated >= snapshot.weights_bytes - 4096 * len(snapshot.weights)
    last = tensors.popitem()[1][:1]
    tensors.clear()
    assert fake_cuda.state.allocated > 0, "a view of one tensor keeps its slab"
    assert fake_cuda.state.contexts == 1
    del last
    fake_cuda.check_released()


def test_a_model_on_the_gpu_is_that_of_from_pretrained(fake_cuda: FakeCuda, snapshot: Snapshot, tmp_path: Path) -> None:
    reading = start_reading(snapshot, beside=True, ring_bytes=1)
    model = load_model(snapshot, "cpu", reading=reading, transfer=on_gpus(reading))
    assert_equal(model, type(model).from_pretrained(tmp_path / "original", dtype=torch.float16))
    assert fake_cuda.state.bytes_copied >= snapshot.weights_bytes - 4096 * len(snapshot.weights)
    del model, reading
    gc.collect()
    fake_cuda.check_released()


@pytest.mark.parametrize("delay_us", [0, 3000])
@pytest.mark.parametrize("beside", [False, True])
def test_slots_wait_for_the_copies_out_of_them(
    delay_us: int, beside: bool, fake_cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", str(delay_us))
    files = [weights_file(tmp_path, f"{i}.safetensors", 9 * MB + 17 * i, MB) for i in range(3)]
    reading = start(tmp_path, files, MB, ring_bytes=4 * MB, beside=beside)
    transfer = on_gpus(reading)
    transfer.wait()
    reading.close()
    for file in files:
        (slab,) = transfer.slabs[file.path]
        assert bytes(tensor_of(slab.memory).numpy()) == (tmp_path / file.path).read_bytes()[slab.begin :]
    assert fake_cuda.state.contexts == 1
    assert fake_cuda.state.streams == fake_cuda.state.events == fake_cuda.state.pinned == 0
    del transfer, slab
    fake_cuda.check_released()


def test_each_slot_of_the_ring_is_pinned_by_itself(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    files = [weights_file(tmp_path, "0.safetensors", 20 * MB, MB)]
    reading = start(tmp_path, files, MB, ring_bytes=8 * MB)
    on_gpus(reading).wait()
    reading.close()
    assert fake_cuda.state.pinned_at_once == MB
    fake_cuda.check_released()


def test_a_slow_context_only_delays_the_copies(
    fake_cuda: FakeCuda, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_INIT_MS", "300")
    reading = start_reading(snapshot, ring_bytes=1)
    tensors = load_tensors(snapshot, "cpu", reading=reading, transfer=on_gpus(reading))
    assert torch.equal(*(each["model.norm.weight"] for each in (tensors, load_tensors(snapshot, "cpu"))))


@pytest.mark.parametrize("call", CALLS)
def test_a_driver_that_refuses_a_call_leaves_the_copies_to_torch(
    call: str, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr("modelstore.load.torch_device.TorchDevices", lambda places: made.append(places) or "torch")
    monkeypatch.setenv("FAKE_CUDA_REFUSE", call)
    if call == "cuMemAlloc_v2":  # not even a page: whoever comes next will find no memory either
        with pytest.raises(DoesNotFit, match=r"cuda:0 has no 4\.1 kB free"):
            open_devices(["cuda:0"])
        return
    caplog.set_level("INFO")
    assert open_devices(["cuda:0"]) == "torch"
    assert made == [["cuda:0"]]
    assert f"refuses {call}: refused by the test" in caplog.text.replace("out of memory", "refused by the test")
    monkeypatch.delenv("FAKE_CUDA_REFUSE")
    gc.collect()
    fake_cuda.check_released()


def test_a_machine_without_the_driver_leaves_the_copies_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modelstore.load.torch_device.TorchDevices", lambda _places: "torch")
    monkeypatch.setattr("modelstore.load.device.LIBRARY", "libcuda-that-is-not-here.so")
    caplog.set_level("INFO")
    assert open_devices(["cuda:0"]) == "torch"
    assert "missing or too old" in caplog.text
    monkeypatch.setattr("modelstore.load.device.LIBRARY", "libc.so.6")  # a library without these functions
    assert open_devices(["cuda:0"]) == "torch"
    assert isinstance(open_devices(["cpu"]), HostMemory)


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(
    fake_cuda: FakeCuda, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Gpus([0])
    monkeypatch.setenv("FAKE_CUDA_REFUSE", "cuMemHostRegister_v2")
    reading = start_reading(snapshot, ring_bytes=1)
    transfer = Transfer(reading, lambda: device, lambda _name: "cuda:0")
    tensors = load_tensors(snapshot, "cpu", reading=reading, transfer=transfer)
    assert torch.equal(*(each["model.norm.weight"] for each in (tensors, load_tensors(snapshot, "cpu"))))
    assert caplog.text.count("cannot be pinned") == 1


def test_a_gpu_that_is_too_small_is_named(
    fake_cuda: FakeCuda, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_BYTES", "50000")
    reading = start_reading(snapshot, ring_bytes=1)
    with pytest.raises(DoesNotFit, match=r"cuda:0 has no .* free"):
        load_tensors(snapshot, "cpu", reading=reading, transfer=on_gpus(reading))
    del reading  # it keeps the error, whose traceback keeps the frames
    gc.collect()
    fake_cuda.check_released()


def test_a_wrong_block_frees_the_memory(fake_cuda: FakeCuda, snapshot: Snapshot) -> None:
    path = snapshot.path / snapshot.weights[-1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reading = start_reading(snapshot, ring_bytes=1)
    with pytest.raises(DigestMismatch):
        load_tensors(snapshot, "cpu", reading=reading, transfer=on_gpus(reading))
    del reading  # it keeps the error, whose traceback keeps the frames
    gc.collect()
    fake_cuda.check_released()


def test_a_read_that_is_closed_keeps_nothing_of_the_gpu(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    """Though it keeps the error that ended the copies; a start runs without the collector."""
    files = [weights_file(tmp_path, "0.safetensors", 4 * MB, MB)]
    reading = Reading(ring_bytes=4 * MB)
    reading.add(tmp_path, files, block_bytes=MB)  # and never `no_more`
    transfer = on_gpus(reading)
    while fake_cuda.state.copies < 4:
        time.sleep(0.001)
    gc.disable()
    try:
        reading.close()
        transfer.end()
        fake_cuda.check_released()
    finally:
        gc.enable()


def test_each_tensor_goes_to_the_gpu_of_its_module(
    fake_cuda: FakeCuda, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_GPUS", "2")
    placed = {"": torch.device("cuda:0"), "model.layers.1": torch.device("cuda:1"), "lm_head": torch.device("cpu")}
    reading = start_reading(snapshot, ring_bytes=1)
    transfer = begin_transfer(reading, placed)
    assert transfer is not None
    weights = ArrivingTensors(reading, transfer, Timeline())
    weights.prepare(snapshot)
    tensors = weights.wait()
    for slab in (slab for slabs in transfer.slabs.values() for slab in slabs):
        for tensor in slab.tensors:
            expected = next((str(placed[name]) for name in placed if name and tensor.name.startswith(name)), "cuda:0")
            assert getattr(slab.memory, "device", "cpu") == expected, tensor.name
    for name, tensor in load_tensors(snapshot, "cpu").items():
        assert torch.equal(tensors[name], tensor), name
    reading.close()


def test_memory_is_freed_in_any_thread(fake_cuda: FakeCuda) -> None:
    gpus = Gpus([0])
    memory = [gpus.allocate("cuda:0", 4096)]
    gpus.close()
    del gpus
    thread = threading.Thread(target=memory.clear)
    thread.start()
    thread.join()
    fake_cuda.check_released()


def test_memory_under_a_copy_is_freed_after_it(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "100000")
    gpus = Gpus([0])
    page = memoryview(mmap.mmap(-1, 4096))
    gpus.pin(page)
    memory = gpus.allocate("cuda:0", 4096)
    event = gpus.copy([Part(memory, 0, page)])
    assert not gpus.is_done(event)
    del memory
    fake_cuda.check()
    assert fake_cuda.state.allocated == 0
    gpus.wait(event)
    gpus.unpin(page)
    gpus.close()
    del gpus, event
    fake_cuda.check_released()


def test_an_end_of_the_process_frees_nothing_under_its_users(fake_cuda: FakeCuda) -> None:
    """At the exit the driver goes down by itself, in an order that Python does not know."""
    program = (
        "from modelstore.load.device import Gpus, GpuMemory\n"
        f"gpus = Gpus([0], {str(fake_cuda.library)!r})\n"
        "memory = gpus.allocate('cuda:0', 1 << 20)\n"
        "print(memory.size_bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1048576\n", "")


def test_kernels_are_loaded_when_they_are_needed(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    Gpus([0]).close()
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"


def test_an_empty_tensor_has_memory(fake_cuda: FakeCuda) -> None:
    gpus: Any = Gpus([0])
    assert tensor_of(gpus.allocate("cuda:0", 1)).shape == (1,)
    empty = gpus.allocate("cuda:0", 0)
    assert isinstance(empty, GpuMemory)
    assert empty.__cuda_array_interface__["shape"] == (0,)
    gpus.close()


def test_a_refused_call_names_itself(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceFailed, match="cuDeviceGet: refused by the test") as caught:
        Gpus([5])
    assert caught.value.code == 101
