"""Encoders with sentence-transformers: vectors of texts, and cross-encoders that order documents.

The library reads a folder by itself. Here its two ways to weights, transformers' `from_pretrained` and its own
`load_torch_weights`, are led to the tensors that the store's reader has brought.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Module
from transformers import PreTrainedModel

from handler.answers import Answer, WholeAnswer, whole
from handler.embeddings import (
    EmbedRequest,
    EncoderRequest,
    RerankRequest,
    embeddings_output,
    parse_encoder_job,
    rerank_output,
)
from handler.engines import LARGE, MANY
from handler.engines.abandoned import Abandoned
from handler.engines.batcher import free_memory
from handler.errors import gpu_loss, invalid, not_a_number, not_served
from handler.jobs import JobContext
from handler.openai_routes import models
from modelstore.errors import IntegrityError, NotServable, Refused
from modelstore.load.model import build_part
from modelstore.load.model_class import MESSAGE_CHARACTERS
from modelstore.load.tensors import load_tensors
from modelstore.pending_start import PendingStart
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.units import one_line
from modelstore.volume.layout import Layout
from modelstore.volume.snapshots import Catalog, Snapshot, check_code

_LIBRARY_CONFIG = "config_sentence_transformers.json"
_MODULES_INDEX = "modules.json"
_STUCK_S = 120.0  # for a batch that goes on though its job has ended


class EmbeddingEngine:
    """Answers with one encoder or cross-encoder, a job at a time; each job is a batch."""

    jobs_at_once = MANY
    beside_the_prompt = LARGE

    def __init__(self, encoder: SentenceTransformer | CrossEncoder, pending: PendingStart) -> None:
        self._encoder = encoder
        self._snapshot = pending.snapshot
        self._settings: Settings = pending.settings
        self._in_use = pending.in_use
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._is_wanted = threading.Event()  # of the job that the thread works for
        self._abandoned = Abandoned()
        self._lost_gpu = ""
        encoder.register_forward_pre_hook(self._before_batch)

    @classmethod
    def load(cls, pending: PendingStart, *, while_reading: Callable[[], None] | None = None) -> EmbeddingEngine:
        """The engine from a start whose bytes are in flight; `while_reading` is called before the last of them."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        snapshot = pending.snapshot
        check_code(snapshot, trusted=pending.trusted)
        pending.reading.wait_small_files(snapshot)
        if while_reading is not None:
            while_reading()
        tensors = load_tensors(
            snapshot, device, reading=pending.reading, transfer=pending.transfer, timeline=pending.timeline
        )
        if beside := snapshot.weights_beside:
            tensors |= load_tensors(snapshot, device, files=beside)
        with pending.timeline.span("build"):
            encoder = build_encoder(snapshot, tensors, device, trusted=pending.trusted)
        return cls(encoder, pending)

    @property
    def model(self) -> str:
        return self._snapshot.repo_id

    @property
    def broken(self) -> str:
        late_s = self._abandoned.longest_s
        return self._lost_gpu or (f"a batch of texts has not ended for {late_s:.0f} s" if late_s > _STUCK_S else "")

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        request = parse_encoder_job(data, job)
        if request is None:
            return whole(models(job.models, created=job.created))
        if request.model not in (None, self.model, str(self._settings.model)):
            raise not_served(str(request.model), self.model, *self._settings.served_names)
        if isinstance(request, RerankRequest) != isinstance(self._encoder, CrossEncoder):
            kind = "orders documents: send a query and documents"
            if isinstance(request, RerankRequest):
                kind = "makes vectors: send texts"
            raise invalid(f"{self.model} {kind}")
        return self._made(request, job), WholeAnswer()

    async def _made(self, request: EncoderRequest, job: JobContext) -> AsyncIterator[dict[str, Any]]:
        """The one piece of an answer. A caller that stops the iteration ends the work at its next batch."""
        is_wanted = threading.Event()
        is_wanted.set()

        def run() -> dict[str, Any]:
            self._is_wanted = is_wanted
            if isinstance(request, RerankRequest):
                return self._ordered(request, job.id)
            return self._embedded(request)

        work = self._thread.submit(run)
        try:
            yield await asyncio.wrap_future(work)
        except Exception as error:
            self._lost_gpu = gpu_loss(error) or self._lost_gpu
            raise
        finally:
            is_wanted.clear()
            self._abandoned.leave(work)

    def _before_batch(self, *_: Any) -> None:
        if not self._is_wanted.is_set():
            raise Refused("the job of these texts has ended")

    def _embedded(self, request: EmbedRequest) -> dict[str, Any]:
        encoder = self._encoder
        assert isinstance(encoder, SentenceTransformer)
        size = encoder.get_embedding_dimension()
        if request.dimensions is not None and size is not None and request.dimensions > size:
            raise invalid(f"dimensions must be at most {size}, those of {self.model}, not {request.dimensions}")
        if request.prompt_name is not None and request.prompt_name not in encoder.prompts:
            names = ", ".join(encoder.prompts) or "none"
            raise invalid(
                f"prompt_name must be one of the prompts of {self.model} ({names}), not {request.prompt_name}"
            )
        texts = list(request.texts)
        prefix = encoder.prompts.get(request.prompt_name or encoder.default_prompt_name or "", "")
        tokens, truncated = self._counted([(prefix + text,) for text in texts])
        vectors = encoder.encode(
            texts,
            prompt_name=request.prompt_name,
            show_progress_bar=False,
            convert_to_tensor=True,
            normalize_embeddings=request.normalize,
            truncate_dim=request.dimensions,
        )
        made: list[list[float]] = _finite(vectors).tolist()
        return embeddings_output(request, made, tokens=tokens, truncated=truncated, model=self.model)

    def _ordered(self, request: RerankRequest, job_id: str) -> dict[str, Any]:
        assert isinstance(self._encoder, CrossEncoder)
        pairs = [(request.query, document) for document in request.documents]
        scores = self._encoder.predict(pairs, show_progress_bar=False, convert_to_tensor=True)
        tokens, truncated = self._counted(pairs)
        made: list[float] = _finite(scores).tolist()
        return rerank_output(request, made, tokens=tokens, truncated=truncated, model=self.model, job_id=job_id)

    def _counted(self, inputs: Sequence[tuple[str, ...]]) -> tuple[int, list[int]]:
        """The tokens that the model reads of all texts or pairs, and the places of those that it reads in part."""
        tokenizer, longest = self._encoder.tokenizer, self._encoder.max_seq_length or 1 << 60
        if hasattr(tokenizer, "tokenize") and not hasattr(tokenizer, "all_special_ids"):  # of word vectors
            counts = [len(tokenizer.tokenize(text)) for (text,) in inputs]
        elif not hasattr(tokenizer, "all_special_ids"):  # of a static embedding
            counts = [len(tokenizer.encode(text).ids) for (text,) in inputs]
        else:
            columns = [list(column) for column in zip(*inputs, strict=True)]
            counts = [len(ids) for ids in tokenizer(*columns, truncation=False, verbose=False)["input_ids"]]
        if 0 in counts:
            raise invalid(f"text number {counts.index(0)} has no tokens for {self.model}: leave it out")
        truncated = [place for place, count in enumerate(counts) if count > longest]
        return sum(min(count, longest) for count in counts), truncated

    def swap(self, reference: str) -> Timeline:
        raise Refused(f"an encoder such as {self.model} is not exchanged in the process: restart the worker instead")

    def check(self) -> None:
        Catalog(Layout(self._settings.root)).check_unchanged(self._snapshot)
        if self.broken:
            raise IntegrityError(self.broken)

    def status(self) -> dict[str, Any]:
        return {
            "engine": "embedding",
            "model": self.model,
            "commit": self._snapshot.commit,
            "dtype": self._snapshot.dtype,
            "memory": {"weights_bytes": self._snapshot.plain_bytes, "device": str(self._encoder.device)},
        }

    def close(self) -> None:
        self._thread.shutdown()
        self._in_use.end()
        del self._encoder
        free_memory()


def _finite(output: torch.Tensor) -> torch.Tensor:
    """An encoder's output in host memory. Raises JobError if it is not of numbers, which JSON could not hold."""
    made = output.float().cpu()
    if not torch.isfinite(made).all():
        raise not_a_number()
    return made


def build_encoder(
    snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: torch.device, *, trusted: bool = False
) -> SentenceTransformer | CrossEncoder:
    """The library's model of a snapshot, from tensors whose names begin with the folder of their module.

    Raises NotServable if the library makes none of it, or if it gives several scores a document.
    """
    cls = CrossEncoder if _is_cross_encoder(snapshot) else SentenceTransformer
    try:
        with _weights_from(snapshot, tensors, device):
            encoder = cls(
                str(snapshot.path), device=str(device), local_files_only=True, trust_remote_code=trusted
            ).eval()
    except (ImportError, ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        raise NotServable(
            f"sentence-transformers makes no {cls.__name__} of {snapshot.key}: "
            f"{one_line(str(error), MESSAGE_CHARACTERS)}"
        ) from error
    if isinstance(encoder, CrossEncoder) and encoder.num_labels != 1:
        raise NotServable(
            f"{snapshot.key} gives {encoder.num_labels} scores a document: name a reranker, which gives one"
        )
    return encoder


def _is_cross_encoder(snapshot: Snapshot) -> bool:
    if _LIBRARY_CONFIG in snapshot.manifest.paths:
        return bool(snapshot.config(_LIBRARY_CONFIG).get("model_type") == CrossEncoder.model_type)
    named = snapshot.config().get("architectures") or [""]
    return _MODULES_INDEX not in snapshot.manifest.paths and str(named[0]).endswith("ForSequenceClassification")


@contextmanager
def _weights_from(snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    """Let the modules that the library makes of a snapshot's folder have these tensors."""
    transformers_load, module_load = PreTrainedModel.__dict__["from_pretrained"], Module.__dict__["load_torch_weights"]

    def of_folder(folder: str) -> dict[str, torch.Tensor]:
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        tensors_of = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return tensors_of if prefix else {name: tensor for name, tensor in tensors_of.items() if "/" not in name}

    def from_pretrained(cls: Any, source: Any, *arguments: Any, **keywords: Any) -> Any:
        if source is None:  # of our own
            return transformers_load.__func__(cls, None, *arguments, **keywords)
        return build_part(cls, keywords["config"], snapshot, of_folder(keywords.get("subfolder") or ""), device)

    def load_torch_weights(
        _cls: Any, /, model_name_or_path: str, subfolder: str = "", model: Any = None, **_: Any
    ) -> Any:
        weights = of_folder(subfolder)
        if model is None:
            return weights
        model.load_state_dict(weights)
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    Module.load_torch_weights = classmethod(load_torch_weights)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = transformers_load
        Module.load_torch_weights = module_load


class Loader:
    """See `handler.engines.Loader`."""

    def __init__(self, settings: Settings) -> None:
        pass

    def load(self, pending: PendingStart, import_server: Callable[[], None]) -> EmbeddingEngine:
        return pending.load(partial(EmbeddingEngine.load, while_reading=import_server))

    def cancel(self) -> None:
        """See `handler.engines.Loader`."""
