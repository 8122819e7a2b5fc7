"""Engines: each turns a snapshot into something that answers jobs, behind one small interface.

    text, multi           transformers: one model that can be exchanged, and several of them in one worker
      loaded, context       a model with its tokenizer, and how many tokens it takes
      batcher, batch_room, active_sequence, token_choice, token_processors    many prompts at once
      generation_defaults, chat_template, detokenizer    a model's own defaults; a conversation to a text; tokens to one
      adapters, adapter_gate    adapters beside a model, and their exchange
    diffusion             diffusers
    embedding             sentence-transformers
    vllm_engine           vLLM: OpenAI's routes of a server in a process of its own
      server, vllm_start, vllm_server, vllm_choice    that process, its boot, its program, and when it is taken
    compiled_code         the code that an engine compiles, restored and published
    offload, abandoned    calls beside the event loop, and work whose job has ended before it

`ENGINES` is the table of them. A new engine is a line there, its name in `settings.EngineName`, and a module with a
`Loader`; another server with OpenAI's routes takes `server.py` as vLLM does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from handler.answers import Answer
from handler.jobs import JobContext
from modelstore.pending_start import PendingStart
from modelstore.servable import CheckConfig, check_encodes, check_generates_text, check_nothing, is_encoder
from modelstore.settings import EngineName
from modelstore.timeline import Timeline
from modelstore.volume.layout import SnapshotKey
from modelstore.warmstart import Target


class Engine(Protocol):
    """The worker's view of a loaded model, of any kind."""

    @property
    def model(self) -> str:
        """The name of the model that answers if a job names none."""

    @property
    def jobs_at_once(self) -> int:
        """The most jobs that it takes beside each other."""

    @property
    def beside_the_prompt(self) -> int:
        """The most characters of a job's input beyond those of a prompt: its numbers, or its pictures and texts."""

    @property
    def broken(self) -> str:
        """Why no job can be answered any more in this process; empty if all is well."""

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        """The answer to a job with this input. A caller that stops taking its pieces ends the work on it.

        Raises JobError for errors that the sender can mend, here or from the pieces. Jobs may overlap.
        """

    def swap(self, reference: str) -> Timeline:
        """Serve another model from now on; returns the record of its start. The current one answers meanwhile.

        Raises Refused if that takes a new process.
        """

    def status(self) -> dict[str, Any]:
        """Model, commit, dtype, memory in bytes."""

    def check(self) -> None:
        """Raise ModelStoreError if the model differs from the volume's records, or cannot answer."""

    def close(self) -> None:
        """Finish running requests, then release the model."""


@runtime_checkable
class Compiles(Protocol):
    """An engine whose model torch.compile can make code for."""

    def compile(self) -> None:
        """Have code made when the model runs next."""

    def run_uncompiled(self) -> None:
        """Run the model as it is from now on."""


@runtime_checkable
class ServesAdapters(Protocol):
    """An engine with the adapters of MODEL_ADAPTERS."""

    def adapter(self, name: str) -> SnapshotKey:
        """The snapshot of the adapter that has this name now."""

    def swap_adapter(self, name: str) -> Timeline:
        """Serve the adapter that the name's reference leads to now; returns the record of the exchange. Running answers
        end with the one before."""


MANY = 1 << 30  # jobs: as many as the settings allow
NUMBERS = 1 << 16  # characters of a request's names, numbers and short texts
LARGE = 1 << 25  # characters of pictures or of many texts: more than RunPod takes in one request


class Loader(Protocol):
    """Loads an engine of one kind: the class `Loader` of the engine's module, made with the settings."""

    def load(self, pending: PendingStart, import_server: Callable[[], None]) -> Engine:
        """The engine of a start whose bytes are in flight; `import_server` is called once, while bytes still
        arrive, for the library that brings it requests."""

    def cancel(self) -> None:
        """Give up: `load` failed, or was never called."""


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """One engine.

    `module`: below `handler.engines`. `libraries`: the packages that the import takes its time for, the last of them
    with the module itself. `extra`: of the distribution. `can_serve`: whether a model with this config and these files
    is served by it if ENGINE is not set. `target`: the place that the bytes are read to, see `warmstart.begin`.
    `check_config`: whether it serves a model, told before a download. `warm_up_jobs`: inputs of small jobs; an engine
    is warmed up by the first one that it takes. `compile_jobs`: inputs that have a model compiled for the shapes of
    most jobs, and whose answers are the same each time.
    """

    module: str
    libraries: tuple[str, ...]
    extra: str
    can_serve: Callable[[Mapping[str, Any], Collection[str]], bool]
    target: Target = "device"
    check_config: CheckConfig = check_nothing
    warm_up_jobs: Sequence[Mapping[str, Any]] = ()
    compile_jobs: Sequence[Mapping[str, Any]] = ()


def _is_pipeline(_config: Mapping[str, Any], files: Collection[str]) -> bool:
    return "model_index.json" in files


_PROMPT = "The capital of France is"

ENGINES: Mapping[EngineName, EngineEntry] = {  # the first that can serve a snapshot is taken
    "diffusion": EngineEntry(
        "diffusion",
        ("torch", "diffusers"),
        "diffusion",
        _is_pipeline,
        warm_up_jobs=({"prompt": "a", "num_inference_steps": 1},),
        compile_jobs=({"prompt": "a", "num_inference_steps": 2, "seed": 1},),
    ),
    "embedding": EngineEntry(
        "embedding",
        ("torch", "sentence_transformers"),
        "embedding",
        is_encoder,
        check_config=check_encodes,
        warm_up_jobs=({"texts": ["a"]}, {"query": "a", "documents": ["a"]}),
    ),
    "vllm": EngineEntry("vllm_start", ("aiohttp",), "vllm", lambda _config, _files: False, target="shared"),
    "text": EngineEntry(
        "multi",
        ("torch", "transformers"),
        "worker",
        lambda _config, _files: True,
        check_config=check_generates_text,
        warm_up_jobs=({"prompt": "a", "max_tokens": 2},),
        compile_jobs=(
            {"prompt": _PROMPT, "max_tokens": 8, "temperature": 0},
            {"prompts": [_PROMPT, "One and two"], "max_tokens": 8, "temperature": 0},
        ),
    ),
}


def engine_for(config: Mapping[str, Any], files: Collection[str]) -> EngineName:
    """The engine that serves a model with this config and these files, by path, if ENGINE is not set."""
    return next(name for name, entry in ENGINES.items() if entry.can_serve(config, files))
