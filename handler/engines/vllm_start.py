"""vLLM's boot, beside the read of its weights.

`vllm serve` is started before the snapshot is looked up, and told the model as soon as the small files are there. It
takes the weights out of this process's memory while they arrive (`modelstore/load/vllm_plugin.py`), from a folder that
has the same path on every worker. A block that is damaged is read again from the mended snapshot, while vLLM waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from handler.engines.adapter_gate import most_rank
from handler.engines.compiled_code import CompiledCode
from handler.engines.server import Milestone, Server
from handler.engines.vllm_engine import VllmEngine
from handler.errors import JobError
from modelstore.adapters import Adapter, find_or_make
from modelstore.dtypes import DTYPES
from modelstore.environment import WEIGHTS_SOURCE, with_plugin
from modelstore.errors import InvalidSetting, NotFound, ServerFailed
from modelstore.load import vllm_plugin
from modelstore.load.model_folder import ModelFolder
from modelstore.load.reader import Reading
from modelstore.load.weights_socket import WeightsServer, shared_files
from modelstore.pending_start import PendingStart
from modelstore.runtime import runtime_folder
from modelstore.settings import Settings
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import check_code

logger = logging.getLogger(__name__)

_READY_S = 24 * 3600  # it waits for its engine, which waits for the read: RunPod has a limit of its own
_RESTORED_S = 900.0  # from the last byte to ready, with restored code
_ANSWER_S = 120.0  # for the answer to it
_FIRST_REQUEST = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
_MILESTONES = [
    Milestone(re.compile(pattern), part)
    for pattern, part in (
        (r"non-default args", "imports"),
        (r"Initializing a V1 LLM engine", "configuration"),
        (r"Starting to load model", "processes"),
        (r"Loading weights took", "weights"),
        (r"torch\.compile (and initial profiling/warmup )?(took|takes)|Warming up done", "compilation"),
        (r"Available KV cache memory|KV cache size", "profiling"),
        (r"init engine \(", "graphs"),
    )
]
# No host has this name. Jobs name addresses of pictures and sounds, and vLLM would open any.
NO_DOMAIN = "none: send data: addresses, or set --allowed-media-domains in MODELSTORE_VLLM_ARGS"
# In a config of the model that says how to generate: what vLLM takes from the model's own config without one
_GENERATION = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "bos_token_id")


class Loader:
    """See `handler.engines.Loader`. The server starts at once: it imports vLLM while the snapshot is looked up."""

    def __init__(self, settings: Settings) -> None:
        other = [name for name in ("--lora-modules", "--no-enable-lora") if _names_option(settings, name)]
        if settings.adapters and other:
            raise InvalidSetting(
                f"{min(other)} stands beside MODEL_ADAPTERS: name all adapters there, and leave it out"
            )
        self._settings = settings
        self._command = _command(settings.vllm_python)
        self._place = TemporaryDirectory(prefix="vllm-", dir=runtime_folder())
        vllm_plugin.lend(Path(self._place.name))
        self._socket = Path(self._place.name) / "weights"
        self._adapters: dict[str, Adapter] = {}
        self._code = CompiledCode.of(settings)
        self._server = self._start_server()
        self._arguments: list[str] = []
        self._first_answer = ""
        self._key: SnapshotKey | None = None
        self._is_suspect = False  # the code that was restored: vLLM ended, or hung, with it
        self._weights: WeightsServer | None = None
        self._folder: ModelFolder | None = None

    def load(self, pending: PendingStart, import_server: Callable[[], None]) -> VllmEngine:
        imports = [import_server]

        def build(pending: PendingStart) -> VllmEngine:
            self._give(pending)
            while imports:
                imports.pop()()
            self._wait(pending)
            return self._finished(pending)

        return pending.load(build)

    def cancel(self) -> None:
        with ExitStack() as stack:  # each step is taken, whichever fails
            stack.callback(self._place.cleanup)
            for folder in (self._folder, self._code):
                if folder is not None:
                    stack.callback(folder.close)
            for adapter in self._adapters.values():
                stack.callback(adapter.in_use.end)
            if self._weights is not None:
                stack.callback(self._weights.close)
            stack.callback(self._server.end)

    @property
    def _may_exchange_adapters(self) -> bool:
        return any(reference.kind == "alias" for reference in self._settings.adapters.values())

    def _start_server(self) -> Server:
        return Server(
            "vLLM",
            self._command,
            hint="mend MODELSTORE_VLLM_ARGS, or the variable that became the option, or use ENGINE=text",
            environment=with_plugin(self._place.name, vllm_plugin.NAME)
            | (self._code.environment if self._code is not None else {})
            | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if self._may_exchange_adapters else {})
            | {WEIGHTS_SOURCE: json.dumps({"socket": str(self._socket)}), "VLLM_ENGINE_READY_TIMEOUT_S": str(_READY_S)},
            milestones=_MILESTONES,
        )

    def _give(self, pending: PendingStart) -> None:
        """Tell the server the model, and have it load what the reading reads; called again with another reading if
        bytes of the first were damaged."""
        snapshot, reading = pending.snapshot, pending.reading
        check_code(snapshot, trusted=pending.trusted)
        if self._key not in (None, snapshot.key):  # an alias, or a branch, leads to another model meanwhile
            self._server.end()
            if self._weights is not None:
                self._weights.close()
            self._server, self._weights, self._arguments = self._start_server(), None, []
        self._key = snapshot.key
        if not self._arguments:
            if self._folder is not None:  # bytes of the first reading were damaged before it came that far
                self._folder.close()
            self._folder = ModelFolder(snapshot, reading)
            self._folder.write("generation_config.json", _generation_config(pending))
            files = shared_files(snapshot, reading)
            if _has_own_loader(pending.settings):
                self._folder.link_to_memory(reading)
            elif not files:
                self._folder.check_plain()
            elif self._weights is None:
                self._weights = WeightsServer(self._socket, self._folder.path)
            for name in (name for name in pending.settings.adapters if name not in self._adapters):
                self._adapters[name] = find_or_make(pending.settings, name, snapshot.key, pending.timeline)
            options = _options(pending, self._adapters.values(), is_shared=self._weights is not None)
            if self._code is not None:
                digest = hashlib.sha256("\0".join(options).encode()).hexdigest()  # an option may hold a secret
                facts = {"engine": "vLLM", "versions": self._server.versions(), "arguments": digest}
                self._code.restore(snapshot.key, {**facts, "path": str(self._folder.path)})
            self._arguments = [
                "serve",
                str(self._folder.path),
                *options,
                *_names(pending, self._adapters.values(), self._path_of),
                "--uds",
            ]
            self._server.begin(self._arguments)
        if self._weights is not None:
            self._weights.serve(reading, shared_files(snapshot, reading))

    def _wait(self, pending: PendingStart) -> None:
        """Return when vLLM answers; if it runs code that another worker compiled, as it did there. Raises ServerFailed,
        and what ended the reading."""
        code = self._code
        failure = ""  # in words: the error would keep the reading's memory
        try:
            self._server.wait(partial(self._check, pending.reading))
        except ServerFailed as error:
            if code is None or not code.is_restored:
                raise
            failure, self._is_suspect = str(error), True
        if code is None:
            return
        if failure or not self._is_right(code, pending):
            reason = failure or f"it answers {self._first_answer!r}"
            logger.warning("vLLM starts again without the compiled code: %s", reason)
            self._server.end()
            code.forget()
            if not failure:
                code.quarantine()
            self._server = self._start_server()
            self._server.begin(self._arguments)
            self._server.wait(partial(self._check, pending.reading))
            self._first_answer = self._answer(pending)
        if self._is_suspect:  # and without it vLLM has started
            code.quarantine()
            self._is_suspect = False

    def _check(self, reading: Reading) -> None:
        """Raise what ended the reading; ServerFailed if restored code hangs."""
        reading.check()
        if self._code is None or not self._code.is_restored or reading.ended is None:
            return
        if time.monotonic() - max(reading.ended, self._server.begun_at) > _RESTORED_S:
            raise ServerFailed(f"vLLM has not started within {_RESTORED_S:g} s with compiled code of another worker")

    def _is_right(self, code: CompiledCode, pending: PendingStart) -> bool:
        """Whether vLLM answers as it did where its code was compiled; asked twice, because one request may fail."""
        for _try in range(2):
            self._first_answer = self._answer(pending)
            if code.is_right(self._first_answer):
                return True
        return False

    def _answer(self, pending: PendingStart) -> str:
        """What vLLM answers to a fixed prompt; empty if it answers none."""
        body = _FIRST_REQUEST | {"model": pending.snapshot.key.repo_id}

        async def ask() -> str:
            async with asyncio.timeout(_ANSWER_S):
                async for answer in self._server.answer("/v1/completions", body):
                    if isinstance(answer, dict):
                        return str(answer["choices"][0]["text"])
            return ""

        try:
            return asyncio.run(ask())
        except (
            JobError,
            LookupError,
            TimeoutError,
        ) as error:  # a model that does not generate text, or code that hangs
            logger.info("vLLM does not answer a prompt: %s", str(error) or type(error).__name__)
            return ""

    def _finished(self, pending: PendingStart) -> VllmEngine:
        assert self._folder is not None
        self._server.add_spans(pending.timeline)
        pending.reading.wait_all()
        pending.timeline.add(pending.reading.as_span(pending.timeline))
        if self._weights is not None:
            self._weights.close()
        self._folder.link_to_volume()
        pending.reading.close()
        pending.reading.release_memory()  # before the code is packed, which takes memory
        if self._code is not None:
            self._code.publish(self._first_answer)
        return VllmEngine(self._server, pending, self._adapters, path_of=self._path_of, close=self.cancel)

    def _path_of(self, adapter: Adapter) -> str:
        """The path of an adapter for vLLM, which shows it in its list of models: not the volume's own."""
        link = Path(self._place.name) / "adapters" / "--".join(adapter.snapshot.key.parts)
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(adapter.snapshot.path)
        return str(link)


def _options(pending: PendingStart, adapters: Collection[Adapter], *, is_shared: bool) -> list[str]:
    """The options of `vllm serve` that what it compiles may depend on. `is_shared`: the weights are at a socket."""
    options = ["--dtype", DTYPES[pending.snapshot.key.dtype].torch_name or "auto"]
    options += ["--load-format", vllm_plugin.NAME] if is_shared else []
    options += ["--trust-remote-code"] if pending.trusted else []
    if adapters:
        rank = str(most_rank(adapters))
        options += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", rank]
    return [*options, *pending.settings.vllm_args]


def _names(pending: PendingStart, adapters: Collection[Adapter], path_of: Callable[[Adapter], str]) -> list[str]:
    """The other options."""
    settings = pending.settings
    modules = [json.dumps({"name": each.name, "path": path_of(each)}) for each in adapters]
    names = dict.fromkeys((pending.snapshot.key.repo_id, str(settings.model), *settings.served_names))
    others = ["--lora-modules", *modules] if modules else []
    if not _names_option(settings, "--allowed-media-domains"):
        others += ["--allowed-media-domains", NO_DOMAIN]
    if _names_option(settings, "--generation-config"):
        others += ["--override-generation-config", json.dumps({"max_new_tokens": settings.max_tokens})]
    return [*others, "--served-model-name", *names, "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]


def _names_option(settings: Settings, option: str) -> bool:
    """Whether an option of `vllm serve` is among those of the operator."""
    return any(word.partition("=")[0].replace("_", "-") == option for word in settings.vllm_args)


def _has_own_loader(settings: Settings) -> bool:
    """Whether the options name another load format than ours."""
    words = [word for argument in settings.vllm_args for word in argument.split("=", 1)]
    named = [after for word, after in pairwise(words) if word.replace("_", "-") == "--load-format"]
    return bool(named) and named[-1] != vllm_plugin.NAME


def _generation_config(pending: PendingStart) -> bytes:
    """The model's generation_config.json, with the most tokens that a job may ask for. vLLM takes it for the default
    and the limit of each request; as an option it would be part of the key of what is compiled."""
    config = pending.snapshot.config("generation_config.json")
    if not config:
        config = {name: value for name, value in pending.snapshot.config().items() if name in _GENERATION}
    return json.dumps(config | {"max_new_tokens": pending.settings.max_tokens}, indent=2).encode()


def _command(python: Path | None) -> list[str]:
    """The program that serves with vLLM. `python`: the interpreter of the environment that has it, by default this one.

    Raises NotFound if that does not exist.
    """
    if find_spec("vllm") is None if python is None else not os.access(python, os.X_OK):
        place = "in this environment" if python is None else f"under {python}"
        raise NotFound(f"there is no vLLM {place}: let MODELSTORE_VLLM_PYTHON name the interpreter that has it")
    return [str(python or sys.executable), str(Path(__file__).with_name("vllm_server.py"))]
