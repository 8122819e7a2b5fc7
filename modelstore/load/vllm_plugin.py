"""vLLM's load format `modelstore`: its tensors come from a process that reads the volume, while vLLM boots.

    vllm serve org/name --load-format modelstore        with this package installed beside vLLM, and MODELSTORE_ROOT set

finds the snapshot on the volume, or makes it there, with `modelstore.serve_weights` in a process of its own; every rank
maps that process's memory. A worker of ours is that process itself. The entry point is `vllm.general_plugins`, so
`register` is called in each of vLLM's processes. This file and what it imports need no library but torch: a worker
lends them to an interpreter that has vLLM and nothing of ours (`lend`).
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from modelstore.environment import weights_source
from modelstore.errors import ProcessFailed
from modelstore.load.weights_socket import SharedFile, WeightsClient, connect
from modelstore.volume.header import LENGTH_BYTES, header_length, parse_header

NAME = "modelstore"
_DISTRIBUTION = "runpod_modelstore"

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows the lines of its own loggers


def register() -> None:
    """Teach vLLM the load format; called in each of its processes, more than once in some."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor import model_loader

    if NAME in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return
    model_loader.register_model_loader(NAME)(_loader_class())
    for method in ("__post_init__", "create_engine_config"):  # both use the model's name
        setattr(EngineArgs, method, _after_lookup(getattr(EngineArgs, method)))


def lend(folder: Path) -> None:
    """Make this plug-in known to an interpreter that gets `folder` in PYTHONPATH."""
    metadata = folder / f"{_DISTRIBUTION}-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{NAME} = {__name__}:register\n")
    link = folder / "modelstore"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(__file__).parent.parent)


def _loader_class() -> type:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class ModelStoreLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not there to be checked against
        load_config: Any
        counter_before_loading_weights: float
        """vLLM's own loader, and its check that no weight is missing; only the bytes come by another way."""

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
            own_way = self._encoder_only_lm_prefixes or self.load_config.safetensors_load_strategy == "torchao"
            weights = None if own_way else _connected(source)
            if weights is None:
                logger.warning("vLLM's own loader reads %s: no process serves it", source.model_or_path)
                self.load_config = copy.copy(self.load_config)
                self.load_config.load_format = "auto"
                return super()._get_weights_iterator(source)  # type: ignore[no-any-return]
            self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
            return _tensors(weights, source, self.local_expert_ids)

    return ModelStoreLoader


class _Connection:
    """The weights of a source, by the files that vLLM's own loader would take, until they are closed."""

    def __init__(self, stack: ExitStack, weights: WeightsClient, files: Sequence[SharedFile]) -> None:
        self.weights = weights
        self.files = files
        self.close = stack.close


def _connected(source: Any) -> _Connection | None:
    """The weights of a source, from the process that reads them; None if no process does."""
    socket = weights_source().get("socket")
    if socket is None:
        return None
    stack = ExitStack()
    try:
        weights = stack.enter_context(connect(Path(socket)))
        files = _selected(weights.files, source)
        if Path(weights.folder) == Path(source.model_or_path) and files:
            return _Connection(stack, weights, files)
    except OSError as error:  # it has ended, as before a reload of the weights
        logger.info("nobody serves at %s any more: %s", socket, error)
    stack.close()
    return None


def _tensors(connection: _Connection, source: Any, expert_ids: set[int] | None) -> Iterator[tuple[str, Any]]:
    """The tensors of a source by their names, in the order of its files."""
    from modelstore.load.views import view_of

    weights = connection.weights
    try:
        for file in connection.files:
            weights.wait(file, LENGTH_BYTES)
            length = header_length(file.memory[:LENGTH_BYTES], file_bytes=file.size_bytes, where=file.path)
            weights.wait(file, LENGTH_BYTES + length)
            raw = file.memory[LENGTH_BYTES : LENGTH_BYTES + length]
            header = parse_header(raw, file_bytes=file.size_bytes, where=file.path)
            for tensor in sorted(header.tensors, key=lambda each: each.begin):
                if _is_skipped(tensor.name, source, expert_ids):
                    continue
                weights.wait(file, header.data_start + tensor.end)
                yield source.prefix + tensor.name, view_of(file.memory, header, tensor, file.path)
        weights.tell_loaded()
    finally:
        connection.close()


def _selected(files: Sequence[SharedFile], source: Any) -> list[SharedFile]:
    """The files of a source, as `DefaultModelLoader` takes them: those of the first pattern that has any."""
    folder = f"{source.subfolder}/" if source.subfolder else ""
    inside = {file.path.removeprefix(folder): file for file in files if file.path.startswith(folder)}
    for pattern in source.allow_patterns_overrides or ("*.safetensors",):
        matching = [
            file for name, file in inside.items() if PurePosixPath(name).match(pattern) and _depth(name, pattern)
        ]
        if matching:
            return matching if pattern.endswith(".safetensors") else []
    return []


def _depth(name: str, pattern: str) -> bool:
    """Whether a name lies as deep as a pattern says: as for glob, its asterisks cross no slash."""
    return name.count("/") == pattern.count("/")


def _is_skipped(name: str, source: Any, expert_ids: set[int] | None) -> bool:
    """Whether this rank has no use for a tensor."""
    is_unused = getattr(source, "is_unused_weight", None)
    if is_unused is not None and is_unused(name):
        return True
    if expert_ids is None:
        return False
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return bool(should_skip_weight(name, expert_ids))


def _after_lookup(method: Any) -> Any:
    """The method of EngineArgs, once the model's name has become the folder of its snapshot."""

    @functools.wraps(method)
    def wrapped(args: Any, *positional: Any, **named: Any) -> Any:
        if args.load_format == NAME and not os.path.isdir(args.model):
            _look_up(args)
        return method(args, *positional, **named)

    return wrapped


def _look_up(args: Any) -> None:
    served = weights_source()
    reference = f"{args.model}@{args.revision}" if args.revision else args.model
    if served.get("reference") != reference:
        served = _started(reference)
    if args.tokenizer == args.model:
        args.tokenizer, args.tokenizer_revision = None, None
    args.served_model_name = args.served_model_name or [args.model]
    args.model, args.revision = served["folder"], None
    if args.dtype == "auto" and served["dtype"]:
        args.dtype = served["dtype"]


def _started(reference: str) -> Mapping[str, str]:
    """What the process says that reads the model. It ends with this one, whose end of a pipe it watches."""
    command = [sys.executable, "-P", "-m", "modelstore.serve_weights", reference]  # nothing of this folder is imported
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        status = process.wait()
        raise ProcessFailed(f"{reference} is not served (status {status}): the last lines of the log say why")
    _processes.append(process)
    served: dict[str, str] = json.loads(line)
    return weights_source(served | {"reference": reference})


_processes: list[subprocess.Popen[bytes]] = []  # their pipes stay open as long as this process runs
