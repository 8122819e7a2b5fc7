"""Text jobs as RunPod hands them over: their requests and their answers. Pure functions, no torch, no network.

    in      {"prompt": str | [int] | "prompts": [str | [int]] | "messages": [{"role", "content"}], "max_tokens": 100,
             "temperature": 0.7, "top_p": 0.9, "stream": false, "model": "org/name"}, and the fields of `fields.py`
    out     {"generated_text": str, "tokens_generated": int, "finish_reason": "stop" | "length", "model": str,
             "parameters": {…}}; for `prompts` and `n` the first three are lists, in their order
    stream  {"token": str, "finished": false} as it comes, for lists with "index"; then for each prompt its output,
            with "token": "" and "finished": true
    or      {"error": str, "code": Code}

With `logprobs` an output and each chunk has "logprobs": a list of {"token", "logprob", "bytes", "top_logprobs"}.
worker-vllm's input is understood too: `sampling_params` is an object of the same fields, `max_new_tokens` another name
of `max_tokens`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.errors import invalid, shown
from handler.fields import FIELDS, check_fields, check_server_fields
from handler.prompts import (
    Prompt,
    check_no_template_options,
    parse_messages,
    parse_prompts,
    parse_template_options,
    unparsed_messages,
)
from handler.sampling import Sampling, parse_sampling
from handler.values import flag, integer
from modelstore.settings import Settings

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate, as a text cut by UTF-16 units ends with


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one job."""

    max_tokens: int
    prompt_characters: int
    prompts: int
    steps: int
    pixels: int
    images: int

    @property
    def frames(self) -> int:
        """The most frames of a video: it is as many pictures."""
        return 16 * self.images

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
class JobContext:
    """What an engine is told of a job besides its input. `own_names`: further names of the worker's own model;
    `models`: all names that a job may give. `may_upload`: whether its pictures go into the bucket, if there is one."""

    id: str
    limits: Limits
    own_names: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    may_upload: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    def model_of(self, data: Mapping[str, Any]) -> str | None:
        """The model that a job asks for; None for the worker's own. Raises JobError."""
        name = named_model(data)
        return None if name in ("", *self.own_names) else name


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One job for a text engine.

    `model`: the one that it names. `listed`: its prompts came as a list, and so do its answers. `fit`: max_tokens was
    not named, and is shortened to the room that the model's context leaves. `choices`: so many prompts in a row are the
    same, and get random numbers of their own. `echo`: the texts begin with their prompts. `add_special_tokens`: whether
    the tokenizer adds its own to a prompt; None if that is the tokenizer's or the template's to say. `passed`: the
    fields for a server that reads them itself, as they came.
    """

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    model: str | None = None
    stream: bool = False
    listed: bool = False
    fit: bool = False
    choices: int = 1
    echo: bool = False
    add_special_tokens: bool | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)


def input_of(job: Mapping[str, Any], most_characters: int) -> Mapping[str, Any]:
    """A job's input object. Raises JobError if it is none, if all that it carries is longer than that, or if a text in
    it is no Unicode."""
    data = job.get("input")
    if not isinstance(data, dict):
        raise invalid(f"input must be an object with a prompt or messages, not {shown(data)}")
    _check_all(data, most_characters)
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


@dataclass(frozen=True, slots=True)
class ServerFields:
    """The names of a server's own fields, by the route of its schema."""

    server: str
    names: Mapping[str, frozenset[str]]

    def check(self, data: Mapping[str, Any], route: str, *, native: bool = False) -> None:
        """Raise JobError for a field of a request to `route` that the server does not know; a `native` one has fields
        that the worker reads."""
        known = self.names.get(route)
        if known is not None:
            check_server_fields(data, known, self.server, native=native)


def parse_text(data: Mapping[str, Any], limits: Limits, server: ServerFields | None = None) -> TextRequest:
    """A native text job's request, checked. `server`: the fields of the server that continues it, if one does. Raises
    JobError whose text names the field, the limit and the value."""
    is_vllms = data.get("sampling_params") is not None
    data = _with_sampling_params(data)
    if server is None:
        check_fields(data, "native")
    else:
        server.check(data, "completions" if data.get("messages") is None else "chat/completions", native=True)
    return parse_completion(data, limits, usual=AS_IN_VLLM if is_vllms else Sampling(), keep=server is not None)


AS_IN_VLLM = Sampling(temperature=None, top_p=None, top_k_without_one=0)
"""The defaults of OpenAI's routes, and of worker-vllm's input: the model's own, else none."""


def parse_completion(data: Mapping[str, Any], limits: Limits, *, usual: Sampling, keep: bool = False) -> TextRequest:
    """The request of a text job on any route, whose fields are known to be served there. `usual`: the route's defaults;
    `keep`: the request keeps its fields for a server. Raises JobError."""
    sources = [name for name in ("prompt", "prompts", "messages") if data.get(name) is not None]
    if len(sources) != 1:
        raise invalid("exactly one of prompt, prompts and messages must be given")
    source = sources[0]
    prompts: tuple[Prompt, ...]
    if source == "messages" and keep:
        prompts, listed = (Prompt(messages=unparsed_messages(data["messages"], limits.prompt_characters)),), False
    elif source == "messages":
        messages = parse_messages(data["messages"], limits.prompt_characters)
        prompts, listed = (Prompt(messages=messages, template=parse_template_options(data)),), False
    else:
        check_no_template_options(data)
        prompts, listed = parse_prompts(
            data[source], source, characters=limits.prompt_characters, at_most=limits.prompts
        )
    choices = integer(data, "n", 1, at_least=1, at_most=limits.prompts)
    if len(prompts) * choices > limits.prompts:
        raise invalid(f"n times the prompts must be at most {limits.prompts}, not {len(prompts) * choices}")
    longest = _longest(data)
    echo = flag(data, "echo")
    sampling = parse_sampling(
        {**data, "max_tokens": longest},
        limits.max_tokens,
        usual=usual,
        at_least=0 if echo and source != "messages" else 1,
    )
    adds = None if data.get("add_special_tokens") is None else flag(data, "add_special_tokens")
    return TextRequest(
        tuple(prompt for prompt in prompts for _choice in range(choices)),
        sampling,
        model=named_model(data),
        stream=flag(data, "stream"),
        listed=listed or choices > 1,
        fit=longest is None,
        choices=choices,
        echo=echo,
        add_special_tokens=adds,
        passed={name: value for name, value in data.items() if _is_passed(name, value)} if keep else {},
    )


def _longest(data: Mapping[str, Any]) -> Any:
    """The number of tokens that is asked for, by whichever name; None if there is none. Raises JobError."""
    lengths = {name: data[name] for name in _LENGTHS if data.get(name) is not None}
    if any(value != next(iter(lengths.values())) for value in lengths.values()):
        raise invalid(f"{' and '.join(lengths)} are the same: leave one of them out")
    return next(iter(lengths.values()), None)


_LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
# A request is sent to a server prompt by prompt, with these in a form of ours.
_SENT_OTHERWISE = frozenset((*_LENGTHS, "prompt", "prompts", "messages", "n", "stream", "stream_options", "model"))


def _is_passed(name: str, value: object) -> bool:
    """Whether a server gets this field as it came."""
    known = FIELDS.get(name)
    return value is not None and name not in _SENT_OTHERWISE and not (known is not None and known.text == "harmless")


def _with_sampling_params(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A job's fields, with those of worker-vllm's `sampling_params` beside them. Raises JobError if both have one."""
    params = data.get("sampling_params")
    if params is None:
        return data
    if not isinstance(params, dict):
        raise invalid(f"sampling_params must be an object, not {shown(params)}")
    params = {name: value for name, value in params.items() if value is not None}
    for name in params:
        if data.get(name) is not None:
            raise invalid(f"{name} is in sampling_params and beside them: leave one of the two out")
    return {name: value for name, value in data.items() if name != "sampling_params"} | params
