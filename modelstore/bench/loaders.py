"""Ways to get a model from a volume into memory, ours and the others', each run by race.py in a process of its own.

    python -m modelstore.bench.loaders NAME DEVICE FOLDER

`load_*` load the weights in FOLDER to the point where every page has been looked at, once all imports are done;
`start_*` do the work of a worker from its first line to its first answer. The output is one line of JSON: `seconds`,
of the load alone or since the process began, `peak_bytes` of host memory, and details of the loader.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modelstore.timeline import Timeline

LOAD = {
    "modelstore": "modelstore `load_tensors`",
    "from_pretrained": "`from_pretrained`, float16 (mapped, not held)",
    "disable_mmap": "`from_pretrained(disable_mmap=True)`",
    "safetensors": "safetensors `load_file` (mapped, not held)",
    "safetensors_copied": "safetensors `load_file`, and a copy to hold",
    "safetensors_pread": 'safetensors `load_file(backend="pread")`',
    "safetensors_prefetch": "safetensors `prefetch`",
    "runai": "run:ai model streamer",
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "InstantTensor",
    "volume_cache": "the SDK's `VolumeCache`: copy, then `from_pretrained`",
}
_BLOCK = 8 << 20
_PAGE = 4096

Loaded = tuple[float, dict[str, Any]]


def load_modelstore(folder: Path, device: str) -> Loaded:
    """FOLDER is a snapshot."""
    from modelstore.load.model import load_tensors
    from modelstore.volume.manifest import parse_manifest
    from modelstore.volume.snapshots import Snapshot

    manifest = parse_manifest((folder / "manifest.json").read_bytes(), where=str(folder))
    return _timed(lambda: load_tensors(Snapshot(folder, manifest), device).values())


def load_modelstore_unverified(folder: Path, device: str) -> Loaded:
    """As `load_modelstore`, without comparing checksums: the difference is their cost."""
    from modelstore.load.model import load_tensors
    from modelstore.load.reader import start_reading
    from modelstore.load.torch_device import ring_bytes_for, usable_device
    from modelstore.volume.manifest import parse_manifest
    from modelstore.volume.snapshots import Snapshot

    snapshot = Snapshot(folder, parse_manifest((folder / "manifest.json").read_bytes(), where=str(folder)))
    ring_bytes = ring_bytes_for(usable_device(device))
    return _timed(
        lambda: load_tensors(
            snapshot, device, reading=start_reading(snapshot, verify=False, ring_bytes=ring_bytes)
        ).values()
    )


def load_from_pretrained(folder: Path, device: str, **how: Any) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  the class's own import is not the load

    def load() -> Iterable[Any]:
        placed = {} if device == "cpu" else {"device_map": device}
        return list(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **placed, **how).parameters())

    return _timed(load)


def load_disable_mmap(folder: Path, device: str) -> Loaded:
    return load_from_pretrained(folder, device, disable_mmap=True)


def load_safetensors(folder: Path, device: str, **how: Any) -> Loaded:
    from safetensors.torch import load_file

    return _timed(lambda: [t for path in _weights(folder) for t in load_file(path, device, **how).values()])


def load_safetensors_copied(folder: Path, device: str) -> Loaded:
    """Mapped bytes leave memory whenever the kernel wants, and come back over the network."""
    from safetensors.torch import load_file

    return _timed(lambda: [t.clone() for path in _weights(folder) for t in load_file(path, device).values()])


def load_safetensors_pread(folder: Path, device: str) -> Loaded:
    return load_safetensors(folder, device, backend="pread")


def load_runai(folder: Path, device: str) -> Loaded:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Iterable[Any]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in _weights(folder)], device=device)
            # Without a copy on the CPU its buffers cannot be used again, and it takes twice as long (measured).
            return [t.clone() if device == "cpu" else t for _name, t in streamer.get_tensors()]

    return _timed(load)


def load_safetensors_prefetch(folder: Path, device: str) -> Loaded:
    from safetensors import safe_open

    def load() -> Iterable[Any]:
        tensors = []
        for path in _weights(folder):
            with safe_open(str(path), framework="pt", device=device) as file:
                tensors += [tensor for _name, tensor in file.prefetch()]
        return tensors

    return _timed(load)


def load_fastsafetensors(folder: Path, device: str) -> Loaded:
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> Iterable[Any]:
        loader = SafeTensorsFileLoader(None, device, nogds=True)
        loader.add_filenames({0: [str(path) for path in _weights(folder)]})
        buffer = loader.copy_files_to_device()
        tensors = [buffer.get_tensor(name) for name in loader.get_keys()]
        buffer.close()  # the tensors keep the memory that they are views of
        loader.close()
        return tensors

    return _timed(load)


def load_instanttensor(folder: Path, device: str) -> Loaded:
    import instanttensor

    def load() -> Iterable[Any]:
        with instanttensor.safe_open([str(path) for path in _weights(folder)], framework="pt", device=device) as file:
            return [tensor for _name, tensor in file.tensors()]  # copies, which outlive the file

    return _timed(load)


def load_volume_cache(folder: Path, device: str) -> Loaded:
    """FOLDER is the checkpoint; the mirror on its volume was made before the run, the container's copy is not there."""
    import shutil

    import torch
    from runpod.serverless import VolumeCache
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    local = _local_copy(folder)
    shutil.rmtree(local, ignore_errors=True)
    cache = VolumeCache(dirs=[str(local)], namespace=folder.name, volume_path=str(folder.parent), best_effort=False)

    def load() -> Iterable[Any]:
        if not cache.hydrate():
            raise SystemExit("VolumeCache found no mirror")
        placed = {} if device == "cpu" else {"device_map": device}
        return list(AutoModelForCausalLM.from_pretrained(local, dtype=torch.float16, **placed).parameters())

    try:
        return _timed(load)
    finally:
        shutil.rmtree(local, ignore_errors=True)


def prepare_volume_cache(folder: Path, device: str) -> Loaded:
    """Make the mirror that `load_volume_cache` copies from."""
    import shutil

    from runpod.serverless import VolumeCache

    local = _local_copy(folder)
    shutil.rmtree(local, ignore_errors=True)
    local.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, local)
    cache = VolumeCache(dirs=[str(local)], namespace=folder.name, volume_path=str(folder.parent), best_effort=False)
    began = time.perf_counter()
    cache.sync(background=False)
    seconds = time.perf_counter() - began
    shutil.rmtree(local)
    return seconds, {}


def load_through_ring(folder: Path, device: str) -> Loaded:
    """The host's part of a load to a GPU: FOLDER, a snapshot, is read, decoded and verified block by block in a ring,
    whose slots are free again at once."""
    import xxhash  # noqa: F401  as the next one, imported while it reads otherwise

    from modelstore.load.reader import RING_BYTES, start_reading
    from modelstore.volume import planes  # noqa: F401
    from modelstore.volume.manifest import parse_manifest
    from modelstore.volume.snapshots import Snapshot

    snapshot = Snapshot(folder, parse_manifest((folder / "manifest.json").read_bytes(), where=str(folder)))
    began = time.perf_counter()
    reading = start_reading(snapshot, ring_bytes=RING_BYTES)
    while (block := reading.next_arrival(wait=True)) is not None:
        reading.release(block)
    seconds = time.perf_counter() - began
    reading.close()
    return seconds, {}


def load_floor(folder: Path, device: str) -> Loaded:
    """Every byte of the weights once, into one buffer for each of four threads; no checksum, no tensor."""
    import mmap

    direct = getattr(os, "O_DIRECT", 0)
    blocks = [(path, offset) for path in _weights(folder) for offset in range(0, path.stat().st_size, _BLOCK)]
    blocks.reverse()
    fds = {}
    for path, _offset in blocks:
        if path not in fds:
            fds[path] = os.open(path, os.O_RDONLY | direct)

    def read() -> None:
        buffer = mmap.mmap(-1, _BLOCK)
        while blocks:
            try:
                path, offset = blocks.pop()
            except IndexError:
                return
            os.preadv(fds[path], [buffer], offset)

    began = time.perf_counter()
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, {}


def load_floor_cached(folder: Path, device: str) -> Loaded:
    """As `load_floor`, out of the page cache: a memory copy."""
    os.O_DIRECT = 0  # type: ignore[misc]
    return load_floor(folder, device)


def load_floor_to_device(folder: Path, device: str) -> Loaded:
    """As many bytes as the weights have, out of pinned host memory to the GPU."""
    import torch

    size = sum(path.stat().st_size for path in _weights(folder))
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target.copy_(host)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(-(-size // len(host))):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * size / (-(-size // len(host)) * len(host)), {}


def load_modelstore_by_torch(folder: Path, device: str) -> Loaded:
    """As `load_modelstore`, but that torch copies the blocks: the way if the driver refuses."""
    from modelstore.load import device as driver

    driver.LIBRARY = "libcuda-is-not-asked.so"
    return load_modelstore(folder, device)


def start_plain(folder: Path, device: str) -> Loaded:
    """A plain handler: everything imported, `from_pretrained`, the tokenizer, the first forward."""
    timeline = Timeline()
    with timeline.span("import"):
        import runpod  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    with timeline.span("build"):
        placed = {} if device == "cpu" else {"device_map": device}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, **placed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with timeline.span("read"), torch.inference_mode():  # mapped bytes are read by the forward that needs them
        model.generate(**tokenizer("a", return_tensors="pt").to(device), max_new_tokens=1, do_sample=False)
    timeline.mark("ready")
    return timeline.now(), {"spans": timeline.as_json()["spans"]}


def start_floor(folder: Path, device: str) -> Loaded:
    """All that has to be imported, and the model's skeleton; no weight is read."""
    timeline = Timeline()
    with timeline.span("import"):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        AutoTokenizer.from_pretrained(folder)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        if device != "cpu":
            torch.zeros(1, device=device)
        import runpod  # noqa: F401
    return timeline.now(), {"spans": timeline.as_json()["spans"]}


def _timed(load: Callable[[], Iterable[Any]]) -> Loaded:
    """The seconds of a load. On a GPU its context is up before, and the copies have ended after."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    began = time.perf_counter()
    tensors = list(load())
    if tensors and tensors[0].device.type == "cuda":
        torch.cuda.synchronize()
    else:
        for tensor in tensors:
            tensor.detach().flatten()[:: max(1, _PAGE // tensor.itemsize)].sum()  # mapped pages are read only now
    return time.perf_counter() - began, {}


def _weights(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise SystemExit(f"{folder} holds no weights")
    return paths


def _local_copy(folder: Path) -> Path:
    """The system's disk, which holds the container's own copy."""
    return Path(tempfile.gettempdir(), "modelstore-bench", folder.name)


def _peak_bytes() -> int:
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def main() -> None:
    name, device, folder = sys.argv[1:]
    seconds, arguments = globals()[name](Path(folder), device)
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes(), **arguments}))


if __name__ == "__main__":
    main()
