"""Text jobs as RunPod hands them over: their requests and their answers. Pure functions, no torch, no network.

    in      {"prompt": str | "prompts": [str] | "messages": [{"role", "content"}], "max_tokens": 100,
             "temperature": 0.7, "top_p": 0.9, "top_k", "repetition_penalty", "seed", "stop": str | [str],
             "stream": false, "model": "org/name"}
    out     {"generated_text": str, "tokens_generated": int, "finish_reason": "stop" | "length", "model": str,
             "parameters": {…}}; for `prompts` the first three are lists, in their order
    stream  {"token": str, "finished": false} as it comes, for `prompts` with "index"; then for each prompt its
            output, with "token": "" and "finished": true
    or      {"error": str, "code": Code}

`temperature: 0` means greedy. A field that is not listed is ignored, as RunPod's own workers do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.errors import invalid, shown
from modelstore.settings import Settings

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1_000_000
MIN_REPETITION_PENALTY = 0.1
MAX_REPETITION_PENALTY = 10.0
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_SEED = 2**63 - 1
MAX_MESSAGES = 4096
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, as a text cut by UTF-16 units ends with
_BESIDE_THE_PROMPT = 1 << 16  # characters of a request's names, numbers and short texts


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one job."""

    max_tokens: int
    prompt_characters: int
    prompts: int
    steps: int
    pixels: int
    images: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that the operator has set."""
        return cls(
            settings.max_tokens,
            settings.max_prompt_characters,
            settings.max_prompts,
            settings.max_steps,
            settings.max_pixels,
            settings.max_images,
        )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to end. None means the model's own default."""

    max_tokens: int = 100
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters as an answer repeats them: those of the job, and the usual defaults."""
        fields = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        optional = {"top_k": self.top_k, "repetition_penalty": self.repetition_penalty, "seed": self.seed}
        fields |= {name: value for name, value in optional.items() if value is not None}
        return fields | ({"stop": list(self.stop)} if self.stop else {})


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text to continue, or a conversation for the chat template."""

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One job for a text engine.

    `model`: the one that it names. `listed`: its prompts came as a list, and so do its answers. `fit`: max_tokens was
    not named, and is shortened to the room that the model's context leaves. `choices`: so many prompts in a row are the
    same, and get random numbers of their own.
    """

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    model: str | None = None
    stream: bool = False
    listed: bool = False
    fit: bool = False
    choices: int = 1


def input_of(job: Mapping[str, Any], limits: Limits) -> Mapping[str, Any]:
    """A job's input object. Raises JobError if it is none, if all that it carries is longer than a prompt may be, or if
    a text in it is no Unicode."""
    data = job.get("input")
    if not isinstance(data, dict):
        raise invalid(f"input must be an object with a prompt or messages, not {shown(data)}")
    _check_all(data, limits.prompt_characters + _BESIDE_THE_PROMPT)
    return data


def _check_all(data: object, limit: int) -> None:
    """Raise JobError if all texts and names in `data`, at any depth, with one for each value, are more than `limit`
    characters, or if one is no Unicode. Looks at no more of it than that takes."""
    waiting = [data]
    size = 0
    while waiting:
        value = waiting.pop()
        size += 1 + (len(value) if isinstance(value, str | dict | list) else 0)
        if size > limit:
            raise invalid(f"input must have at most {limit} characters together with its names and numbers")
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and (half := _HALF_CHARACTER.search(value)):
            place = shown(value[max(0, half.start() - 20) : half.end()])
            raise invalid(f"input holds half a character, at the end of {place}: send texts that are whole Unicode")


def named_model(data: Mapping[str, Any]) -> str | None:
    """The model that a job names. Raises JobError if that is no name."""
    name = data.get("model")
    if name is not None and not isinstance(name, str):
        raise invalid(f"model must be a string, not {shown(name)}")
    return name


def parse_text(data: Mapping[str, Any], limits: Limits) -> TextRequest:
    """A text job's request, checked. Raises JobError whose text names the field, the limit and the value."""
    sources = [name for name in ("prompt", "prompts", "messages") if data.get(name) is not None]
    if len(sources) != 1:
        raise invalid("exactly one of prompt, prompts and messages must be given")
    if sources == ["prompts"]:
        prompts = _prompts(data["prompts"], limits)
    elif sources == ["prompt"]:
        prompts = (Prompt(_text(data["prompt"], "prompt", limits)),)
    else:
        prompts = (Prompt(messages=parse_messages(data["messages"], limits)),)
    return TextRequest(
        prompts,
        parse_sampling(data, limits),
        model=named_model(data),
        stream=flag(data, "stream"),
        listed=sources == ["prompts"],
        fit=data.get("max_tokens") is None,
    )


def parse_sampling(
    data: Mapping[str, Any], limits: Limits, *, temperature: float = 0.7, top_p: float = 0.9
) -> Sampling:
    """The fields that say how to choose tokens; `temperature` and `top_p` are defaults. Raises JobError."""
    top_k = repetition_penalty = seed = None
    if data.get("top_k") is not None:
        top_k = integer(data, "top_k", 0, at_least=0, at_most=MAX_TOP_K)
    if data.get("repetition_penalty") is not None:
        repetition_penalty = number(
            data, "repetition_penalty", 1.0, at_least=MIN_REPETITION_PENALTY, at_most=MAX_REPETITION_PENALTY
        )
    if data.get("seed") is not None:
        seed = integer(data, "seed", 0, at_least=0, at_most=MAX_SEED)
    return Sampling(
        max_tokens=integer(data, "max_tokens", min(100, limits.max_tokens), at_least=1, at_most=limits.max_tokens),
        temperature=_temperature(data, temperature),
        top_p=number(data, "top_p", top_p, above=0.0, at_most=1.0),
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=_stop(data.get("stop")),
    )


def parse_messages(value: object, limits: Limits) -> tuple[Mapping[str, str], ...]:
    """A conversation; contents may be OpenAI's lists of text parts. Raises JobError."""
    if not isinstance(value, list) or not value:
        raise invalid(f"messages must be a list with at least one message, not {shown(value)}")
    check_message_count(value)
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise invalid(f"messages[{index}] must be an object, not {shown(message)}")
        content = _joined_parts(message.get("content"), index)
        for name, text in (("role", message.get("role")), ("content", content)):
            if not isinstance(text, str) or not text:
                raise invalid(f"messages[{index}].{name} must be a string that is not empty")
        messages.append({"role": message["role"], "content": content})
    if (size := sum(len(text) for message in messages for text in message.values())) > limits.prompt_characters:
        raise invalid(f"messages must have at most {limits.prompt_characters} characters together, not {size}")
    return tuple(messages)


def check_message_count(messages: list[Any]) -> None:
    """Raise JobError if a conversation has more messages than a template is given."""
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"messages must be at most {MAX_MESSAGES} messages, not {len(messages)}")


def _joined_parts(content: object, index: int) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise invalid(f"messages[{index}].content may hold parts of type text alone, not {shown(part)}")
    return "".join(part["text"] for part in content)


def _prompts(value: object, limits: Limits) -> tuple[Prompt, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= limits.prompts:
        shown_value = f"{len(value)}" if isinstance(value, list) else shown(value)
        raise invalid(f"prompts must be a list of 1 to {limits.prompts} strings, not {shown_value}")
    return tuple(Prompt(_text(text, f"prompts[{index}]", limits)) for index, text in enumerate(value))


def _text(value: object, name: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string, not {shown(value)}")
    if not value:
        raise invalid(f"{name} must not be empty")
    if len(value) > limits.prompt_characters:
        raise invalid(f"{name} must have at most {limits.prompt_characters} characters, not {len(value)}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    usable = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not usable or any(not isinstance(s, str) or not 1 <= len(s) <= MAX_STOP_CHARACTERS for s in stops):
        raise invalid(
            f"stop must be a string or at most {MAX_STOPS} of them, each of 1 to {MAX_STOP_CHARACTERS} characters, "
            f"not {shown(value)}"
        )
    return tuple(stops)


def _temperature(data: Mapping[str, Any], default: float) -> float:
    """0 for greedy, else large enough that dividing by it stays finite: on a GPU it would not be an exception."""
    value = number(data, "temperature", default, at_least=0.0, at_most=MAX_TEMPERATURE)
    if 0 < value < MIN_TEMPERATURE:
        raise invalid(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE:g}, not {value:g}")
    return value


def flag(data: Mapping[str, Any], name: str) -> bool:
    """A switch that is off by default. Raises JobError."""
    value = False if data.get(name) is None else data[name]
    if not isinstance(value, bool):
        raise invalid(f"{name} must be true or false, not {shown(value)}")
    return value


def integer(data: Mapping[str, Any], name: str, default: int, *, at_least: int, at_most: int) -> int:
    """A whole number within limits. Raises JobError."""
    value = default if data.get(name) is None else data[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise invalid(f"{name} must be an integer between {at_least} and {at_most}, not {shown(value)}")
    return value


def number(
    data: Mapping[str, Any],
    name: str,
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float,
) -> float:
    """A number within limits. Raises JobError."""
    value = default if data.get(name) is None else data[name]
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value <= at_most
    if not usable or (at_least is not None and value < at_least) or (above is not None and value <= above):
        low = f"at least {at_least:g}" if at_least is not None else f"above {above:g}"
        raise invalid(f"{name} must be a number {low} and at most {at_most:g}, not {shown(value)}")
    return float(value)
