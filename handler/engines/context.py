"""How many tokens a model takes: its context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from handler.errors import invalid
from handler.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Context:
    """The most tokens that a model takes; a limit is None if the config of the model has none.

    Most models read a prompt and the answer behind it as one text: `together`. One with an encoder reads the `prompt`
    in that, and has the `answer` alone in its decoder.
    """

    together: int | None = None
    prompt: int | None = None
    answer: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Context:
        """The context of a model that generates text."""
        config = model.config
        whole = _positions(config.get_text_config(), "max_position_embeddings")
        if not config.is_encoder_decoder:
            return cls(together=whole)
        prompt, answer = (
            _positions(getattr(config, part, None), "max_position_embeddings")
            or _positions(config, f"max_{part}_position_embeddings")
            or whole
            for part in ("encoder", "decoder")
        )
        return cls(prompt=prompt, answer=answer and answer - 1)  # the decoder begins with a token of its own

    @property
    def size(self) -> int | None:
        """The limit of a prompt with its answer, or, if they have one each, of the prompt."""
        return self.together or self.prompt

    def fitted(self, prompt_tokens: int, sampling: Sampling, *, shorten: bool, label: str) -> Sampling:
        """How to sample within the context. `shorten`: whether the answer may be shorter than `max_tokens`. `label`: of
        the model, for errors. Raises JobError if prompt and answer do not go into the context."""
        if prompt_tokens == 0:
            raise invalid("prompt has no tokens")
        if self.prompt is not None and prompt_tokens > self.prompt:
            raise invalid(f"the prompt's {prompt_tokens} tokens exceed the {self.prompt} tokens that {label} reads")
        room = self.answer if self.together is None else self.together - prompt_tokens
        if room is None or sampling.max_tokens <= room:
            return sampling
        if shorten and room > 0:
            return replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))
        if self.together is None:
            raise invalid(f"max_tokens {sampling.max_tokens} exceeds the {room} tokens that {label} writes at most")
        context = f"the context of {self.together} tokens of {label}"
        if shorten and not room:
            raise invalid(f"the prompt's {prompt_tokens} tokens leave no room for an answer in {context}")
        asked = "" if shorten else f" and max_tokens {sampling.max_tokens}"
        raise invalid(f"the prompt's {prompt_tokens} tokens{asked} exceed {context}")


def _positions(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
