"""Text generation with transformers."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from handler.jobs import Code, Completion, JobError, TextRequest
from modelstore.catalog import Catalog
from modelstore.errors import Refused
from modelstore.layout import Layout, SnapshotKey
from modelstore.loader import load_model
from modelstore.pins import InUse
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.tensors import check_room, needs_several_gpus
from modelstore.timeline import Timeline
from modelstore.warmstart import Begun, begin


@dataclass(frozen=True, slots=True)
class Loaded:
    """A causal language model with its tokenizer; `context` is the most tokens that it takes, where it says so."""

    key: SnapshotKey
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    in_use: InUse

    @classmethod
    def from_start(
        cls, begun: Begun, *, device: str | torch.device | None = None, meanwhile: Callable[[], None] | None = None
    ) -> Loaded:
        """The tokenizer and the model while the bytes are in flight; then `meanwhile`, once; then the last bytes."""
        with begun.timeline.span("import"):
            trusted = begun.settings.trust_remote_code and begun.snapshot.manifest.remote_code
            tokenizer = AutoTokenizer.from_pretrained(begun.snapshot.path, trust_remote_code=trusted)
        model = load_model(
            begun.snapshot,
            device,
            device_map="auto" if device is None and needs_several_gpus(begun.snapshot) else None,
            reading=begun.reading,
            timeline=begun.timeline,
            trust_remote_code=begun.settings.trust_remote_code,
            weights=begun.early,
            meanwhile=meanwhile,
        )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        known = context if isinstance(context, int) and context > 0 else None
        return cls(begun.snapshot.key, model, tokenizer, known, begun.in_use)


class TextEngine:
    """Answers with one loaded model, which can be exchanged for another while it answers."""

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self._loaded = loaded
        self._settings = settings
        self._kept: Loaded | None = None
        self._device = loaded.model.device
        self._answering = threading.Lock()
        self._swapping = threading.Lock()

    @classmethod
    def load(cls, begun: Begun, *, meanwhile: Callable[[], None] | None = None) -> TextEngine:
        """The engine from a start whose bytes are in flight; `meanwhile` is called once, before the last of them."""
        return cls(Loaded.from_start(begun, meanwhile=meanwhile), begun.settings)

    @property
    def model(self) -> str:
        """The model's name in answers."""
        return self._loaded.key.repo_id

    def swap(self, reference: str) -> Timeline:
        """Serve another model from now on; returns the record of its start, in seconds since this call.

        It is found or made, read and built in host memory while the current one answers; then, between two answers,
        they change places. With MODELSTORE_KEEP_PREVIOUS the one before stays in host memory, and to swap back is a
        memory copy. Raises what a start raises; the current model then goes on.
        """
        with self._swapping:
            settings = replace(self._settings, model=parse_reference(reference))
            timeline = Timeline(worker=settings.worker_id, model=str(settings.model), began=time.monotonic())
            loaded = self._in_memory(settings, timeline)
            if loaded is None:
                begun = begin(settings, timeline=timeline, to_host=True)
                try:
                    loaded = begun.load(partial(Loaded.from_start, device="cpu"))
                    self._exchange(loaded, timeline)
                except BaseException:
                    begun.in_use.end()
                    raise
            elif loaded is not self._loaded:
                self._exchange(loaded, timeline)
            timeline.mark("ready")
            return timeline

    def _in_memory(self, settings: Settings, timeline: Timeline) -> Loaded | None:
        """The model that serves, or the one that was kept, if the volume's records say that it is what is wanted."""
        assert settings.model is not None
        settings.check_allowed(settings.model)
        with timeline.span("lookup"):
            found = Catalog(Layout(settings.root)).find(settings.model, settings.dtype)
        for loaded in (self._loaded, self._kept):
            if loaded is not None and found is not None and found.key == loaded.key:
                timeline.commit, timeline.dtype = found.commit, found.dtype
                timeline.outcome, timeline.reason = "hit", "the model was in host memory"
                return loaded
        return None

    def _exchange(self, loaded: Loaded, timeline: Timeline) -> None:
        """Let the answer that is being made end, and go on with another model on the same device."""
        before = self._loaded
        if hasattr(before.model, "hf_device_map"):
            raise Refused(f"{self.model} lies on several GPUs and cannot be exchanged: restart the worker instead")
        with self._answering, timeline.span("transfer"):
            if self._device.type != "cpu":
                check_room(loaded.model, self._device, besides=before.model)
                try:
                    before.model.to("cpu")
                    self.free_memory()
                    loaded.model.to(self._device)
                except BaseException:
                    loaded.model.to("cpu")
                    before.model.to(self._device)
                    raise
            self._loaded = loaded
        dropped = [self._kept, None if self._settings.keep_previous else before]
        self._kept = before if self._settings.keep_previous else None
        for one in dropped:
            if one is not None and one is not loaded:
                one.in_use.end()
        del before, dropped
        self.free_memory()

    def generate(self, request: TextRequest) -> Completion:
        """See Engine. Greedy where the temperature is 0."""
        with self._answering:
            return self._generate(request, self._loaded)

    def _generate(self, request: TextRequest, loaded: Loaded) -> Completion:
        inputs = _encode(request, loaded).to(loaded.model.device)
        prompt_tokens = int(inputs["input_ids"].shape[1])
        _check_length(prompt_tokens, request, loaded)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        if request.temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            output = loaded.model.generate(
                **inputs, max_new_tokens=request.max_tokens, pad_token_id=_pad_token_id(loaded), **sampling
            )
        new = output[0][prompt_tokens:]
        return Completion(loaded.tokenizer.decode(new, skip_special_tokens=True), len(new))

    def free_memory(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _encode(request: TextRequest, loaded: Loaded) -> Any:
    if request.prompt is not None:
        return loaded.tokenizer(request.prompt, return_tensors="pt", return_token_type_ids=False)
    if not loaded.tokenizer.chat_template:
        raise JobError(
            Code.INVALID_INPUT, f"{loaded.key.repo_id} has no chat template: send prompt instead of messages"
        )
    try:
        return loaded.tokenizer.apply_chat_template(
            [dict(message) for message in request.messages],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:  # templates raise their own errors, of any class, for roles they do not take
        raise JobError(
            Code.INVALID_INPUT, f"messages do not fit the chat template of {loaded.key.repo_id}: {error}"
        ) from error


def _check_length(prompt_tokens: int, request: TextRequest, loaded: Loaded) -> None:
    if prompt_tokens == 0:
        raise JobError(Code.INVALID_INPUT, "prompt has no tokens")
    if loaded.context is not None and prompt_tokens + request.max_tokens > loaded.context:
        raise JobError(
            Code.INVALID_INPUT,
            f"the prompt's {prompt_tokens} tokens and max_tokens {request.max_tokens} exceed the context of "
            f"{loaded.context} tokens of {loaded.key.repo_id}",
        )


def _pad_token_id(loaded: Loaded) -> int | None:
    pad: int | None = loaded.tokenizer.pad_token_id
    end: int | None = loaded.tokenizer.eos_token_id
    return end if pad is None else pad
