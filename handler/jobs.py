"""Jobs as RunPod hands them over: what may be asked, and what is answered. Pure functions, no torch, no network.

    in   {"prompt": str | "messages": [{"role", "content"}], "max_tokens": 100, "temperature": 0.7, "top_p": 0.9,
          "model": "org/name"}
    out  {"generated_text": str, "tokens_generated": int, "model": str, "parameters": {…}}
    or   {"error": str, "code": Code}

`temperature: 0` means greedy. A field that is not listed is ignored, as RunPod's own workers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_TOKENS = 2048
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0
MAX_PROMPT_CHARACTERS = 1_000_000


class Code(StrEnum):
    """Why a job failed; the `code` of an error."""

    INVALID_INPUT = "INVALID_INPUT"
    OOM = "OOM"
    MODEL_NOT_ALLOWED = "MODEL_NOT_ALLOWED"
    MODEL_UNAVAILABLE = "MODEL_UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"


class JobError(Exception):
    """A job that ends in an error that its sender gets to see."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code

    def payload(self) -> dict[str, str]:
        """The handler's return value; the SDK sends `error` as the job's error, and makes an empty one vanish."""
        return {"error": str(self) or self.code.value, "code": self.code.value}


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One text generation; exactly one of `prompt` and `messages` is set."""

    prompt: str | None
    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    temperature: float
    top_p: float

    @property
    def parameters(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine made of a request; `text` is the new text alone."""

    text: str
    tokens: int


def parse_job(job: Mapping[str, Any], *, model: str) -> TextRequest:
    """A job's request, checked; `model` is the one that is served.

    Raises JobError whose text names the field, the limit and what was given.
    """
    data = job.get("input")
    if not isinstance(data, dict):
        raise _invalid(f"input must be an object with a prompt or messages, not {_kind(data)}")
    asked = data.get("model")
    if asked is not None and asked not in (model, model.partition("@")[0]):
        raise JobError(Code.MODEL_NOT_ALLOWED, f"this worker serves {model}, not {str(asked)[:200]!r}")
    for name in ("stream", "prompts"):
        if data.get(name):
            raise _invalid(f"{name} is not served by this version: send one prompt, or messages, a job")
    prompt, messages = data.get("prompt"), data.get("messages")
    if (prompt is None) == (messages is None):
        raise _invalid("exactly one of prompt and messages must be given")
    return TextRequest(
        prompt=None if prompt is None else _prompt(prompt),
        messages=() if messages is None else _messages(messages),
        max_tokens=_integer(data, "max_tokens", 100, at_least=1, at_most=MAX_TOKENS),
        temperature=_temperature(data),
        top_p=_number(data, "top_p", 0.9, above=0.0, at_most=1.0),
    )


def completed(completion: Completion, request: TextRequest, *, model: str) -> dict[str, Any]:
    """The output of a finished job."""
    return {
        "generated_text": completion.text,
        "tokens_generated": completion.tokens,
        "model": model,
        "parameters": request.parameters,
    }


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(f"prompt must be a string, not {_kind(value)}")
    if not value:
        raise _invalid("prompt must not be empty")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise _invalid(f"prompt must have at most {MAX_PROMPT_CHARACTERS} characters, not {len(value)}")
    return value


def _messages(value: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _invalid(f"messages must be a list with at least one message, not {_kind(value)}")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise _invalid(f"messages[{index}] must be an object, not {_kind(message)}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str) or not message[name]:
                raise _invalid(f"messages[{index}].{name} must be a string that is not empty")
    if sum(len(message["content"]) for message in value) > MAX_PROMPT_CHARACTERS:
        raise _invalid(f"messages must have at most {MAX_PROMPT_CHARACTERS} characters together")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _temperature(data: Mapping[str, Any]) -> float:
    """0 for greedy, else large enough that dividing by it stays finite: on a GPU it would not be an exception."""
    value = _number(data, "temperature", 0.7, at_least=0.0, at_most=MAX_TEMPERATURE)
    if 0 < value < MIN_TEMPERATURE:
        raise _invalid(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE:g}, not {value:g}")
    return value


def _integer(data: Mapping[str, Any], name: str, default: int, *, at_least: int, at_most: int) -> int:
    value = default if data.get(name) is None else data[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise _invalid(f"{name} must be an integer between {at_least} and {at_most}, not {_shown(value)}")
    return value


def _number(
    data: Mapping[str, Any],
    name: str,
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float,
) -> float:
    value = default if data.get(name) is None else data[name]
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value <= at_most
    if not usable or (at_least is not None and value < at_least) or (above is not None and value <= above):
        low = f"at least {at_least:g}" if at_least is not None else f"above {above:g}"
        raise _invalid(f"{name} must be a number {low} and at most {at_most:g}, not {_shown(value)}")
    return float(value)


def _invalid(message: str) -> JobError:
    return JobError(Code.INVALID_INPUT, message)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{_shown(value)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
