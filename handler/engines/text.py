"""Text generation with transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from handler.jobs import Code, Completion, JobError, TextRequest
from modelstore.loader import load_model
from modelstore.warmstart import Begun


class TextEngine:
    """A causal language model with its tokenizer."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = name
        self._model = model
        self._tokenizer = tokenizer
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._context: int | None = context if isinstance(context, int) and context > 0 else None

    @classmethod
    def load(cls, begun: Begun, *, meanwhile: Callable[[], None] | None = None) -> TextEngine:
        """The tokenizer and the model while the bytes are in flight; then `meanwhile`, once; then the last bytes."""
        with begun.timeline.span("import"):
            trusted = begun.settings.trust_remote_code and begun.snapshot.manifest.remote_code
            tokenizer = AutoTokenizer.from_pretrained(begun.snapshot.path, trust_remote_code=trusted)
        model = load_model(
            begun.snapshot,
            reading=begun.reading,
            timeline=begun.timeline,
            trust_remote_code=begun.settings.trust_remote_code,
            meanwhile=meanwhile,
        )
        return cls(begun.snapshot.repo_id, model, tokenizer)

    def generate(self, request: TextRequest) -> Completion:
        """See Engine. Greedy where the temperature is 0."""
        inputs = self._encode(request).to(self._model.device)
        prompt_tokens = int(inputs["input_ids"].shape[1])
        self._check_length(prompt_tokens, request)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        if request.temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            output = self._model.generate(
                **inputs, max_new_tokens=request.max_tokens, pad_token_id=self._pad_token_id(), **sampling
            )
        new = output[0][prompt_tokens:]
        return Completion(self._tokenizer.decode(new, skip_special_tokens=True), len(new))

    def free_memory(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, request: TextRequest) -> Any:
        if request.prompt is not None:
            return self._tokenizer(request.prompt, return_tensors="pt", return_token_type_ids=False)
        if not self._tokenizer.chat_template:
            raise JobError(Code.INVALID_INPUT, f"{self.model} has no chat template: send prompt instead of messages")
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in request.messages],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        except Exception as error:  # templates raise their own errors, of any class, for roles they do not take
            raise JobError(
                Code.INVALID_INPUT, f"messages do not fit the chat template of {self.model}: {error}"
            ) from error

    def _check_length(self, prompt_tokens: int, request: TextRequest) -> None:
        if prompt_tokens == 0:
            raise JobError(Code.INVALID_INPUT, "prompt has no tokens")
        if self._context is not None and prompt_tokens + request.max_tokens > self._context:
            raise JobError(
                Code.INVALID_INPUT,
                f"the prompt's {prompt_tokens} tokens and max_tokens {request.max_tokens} exceed the context of "
                f"{self._context} tokens of {self.model}",
            )

    def _pad_token_id(self) -> int | None:
        pad: int | None = self._tokenizer.pad_token_id
        end: int | None = self._tokenizer.eos_token_id
        return end if pad is None else pad
