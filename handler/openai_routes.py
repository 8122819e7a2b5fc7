"""OpenAI's routes, as RunPod hands them over: {"openai_route": "/v1/chat/completions", "openai_input": {…}}.

Pure functions: a route's body to a text request, and its pieces to OpenAI's answers, whole or as server-sent events.
Served: chat/completions, completions and models. A field that would change the answer and is not served is refused
rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from handler.answers import TextAnswer, TextDelta
from handler.errors import Code, JobError, invalid, shown
from handler.jobs import (
    Limits,
    Prompt,
    TextRequest,
    check_message_count,
    flag,
    integer,
    named_model,
    parse_messages,
    parse_sampling,
    parse_text,
)

Route = Literal["chat/completions", "completions", "models"]

# The routes that a server with OpenAI's routes is asked for. Not its administration: vLLM loads adapters by a path or a
# repo's name on such a route.
_PASSED_ON = frozenset(
    f"v1/{name}"
    for name in (
        *("chat/completions", "completions", "models", "responses", "embeddings", "pooling", "classify", "score"),
        *("rerank", "audio/transcriptions", "audio/translations"),
    )
)

DONE = "data: [DONE]\n\n"

# The values of these fields that have no effect; any other is refused.
_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
_TYPES = {Code.INVALID_INPUT: "invalid_request_error", Code.MODEL_NOT_ALLOWED: "invalid_request_error"}


def parse_route(route: object) -> Route:
    """The route that is asked for. Raises JobError for one that is not served."""
    for name in ("chat/completions", "completions", "models"):
        if isinstance(route, str) and route.split("?")[0].strip("/") == f"v1/{name}":
            return name
    raise invalid(f"openai_route must be /v1/chat/completions, /v1/completions or /v1/models, not {shown(route)}")


def parse_request(route: object, body: object, limits: Limits) -> tuple[str, Mapping[str, Any] | None]:
    """A route and a body for a server that has OpenAI's routes itself, checked against our limits.

    A request without a body is a GET. Raises JobError.
    """
    path = route.split("?")[0].strip("/") if isinstance(route, str) else ""
    if path not in _PASSED_ON:
        raise invalid(f"openai_route must be one of OpenAI's routes, as in /v1/completions, not {shown(route)}")
    body = {} if body is None else checked_body(body)
    if not body:
        return f"/{path}", None
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if body.get(name) is not None:
            integer(body, name, 1, at_least=1, at_most=limits.max_tokens)
    choices = integer(body, "n", 1, at_least=1, at_most=limits.prompts)
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [body.get("prompt")]
    if isinstance(prompts[0] if prompts else None, str | list) and len(prompts) * choices > limits.prompts:
        raise invalid(f"n times the prompts must be at most {limits.prompts}, not {len(prompts) * choices}")
    size = len(json.dumps([body.get(name) for name in ("prompt", "messages", "input")], ensure_ascii=False))
    if size > limits.prompt_characters:
        raise invalid(f"prompt, messages and input must have at most {limits.prompt_characters} characters, not {size}")
    if isinstance(messages := body.get("messages"), list):
        check_message_count(messages)
    return f"/{path}", body


def checked_body(body: object) -> Mapping[str, Any]:
    """`body`, which is an object. Raises JobError."""
    if not isinstance(body, dict):
        raise invalid("openai_input must be an object")
    return body


def parse_body(route: Route, body: Mapping[str, Any], limits: Limits) -> TextRequest:
    """The request of a completion; `n` choices are as many prompts. Raises JobError."""
    for name, harmless in _WITHOUT_EFFECT.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise invalid(f"{name} is not served: leave it out")
    choices = integer(body, "n", 1, at_least=1, at_most=limits.prompts)
    longest = body.get("max_completion_tokens") if body.get("max_tokens") is None else body["max_tokens"]
    default = 16 if route == "completions" else limits.max_tokens
    fields = {**body, "max_tokens": min(default, limits.max_tokens) if longest is None else longest}
    sampling = parse_sampling(fields, limits, temperature=1.0, top_p=1.0)
    if route == "chat/completions":
        prompts: tuple[Prompt, ...] = (Prompt(messages=parse_messages(body.get("messages"), limits)),)
    else:
        value = body.get("prompt")
        name = "prompts" if isinstance(value, list) else "prompt"
        prompts = parse_text({name: value}, limits).prompts
    if len(prompts) * choices > limits.prompts:
        raise invalid(f"n times the prompts must be at most {limits.prompts}, not {len(prompts) * choices}")
    each = tuple(prompt for prompt in prompts for _choice in range(choices))
    return TextRequest(
        each,
        sampling,
        model=named_model(body),
        stream=flag(body, "stream"),
        listed=True,
        fit=longest is None,
        choices=choices,
    )


def _wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with a chunk of token counts."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


class OpenAIAnswer:
    """Puts the pieces of one request in OpenAI's form: a Responder."""

    def __init__(
        self, route: Route, request: TextRequest, body: Mapping[str, Any], *, job_id: str, created: int
    ) -> None:
        """`body`: the request as it came; `created`: seconds since 1970."""
        self.streams = request.stream
        self._usage_wanted = _wants_usage(body)
        self._chat = route == "chat/completions"
        self._request = request
        self._collected = TextAnswer(request)
        self._begun: set[int] = set()
        kind = "chat.completion" if self._chat else "text_completion"
        self._id = {"id": f"{'chatcmpl' if self._chat else 'cmpl'}-{job_id}", "created": created}
        self._object = kind

    def chunks(self, piece: TextDelta) -> list[Any]:
        """Take the next piece; returns its events of a stream."""
        self._collected.add(piece)
        if not self.streams:
            return []
        choices: list[dict[str, Any]] = []
        if self._chat and piece.index not in self._begun:
            self._begun.add(piece.index)
            choices.append(self._choice(piece.index, {"delta": {"role": "assistant", "content": ""}}, None))
        if piece.text:
            part: dict[str, Any] = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
            choices.append(self._choice(piece.index, part, None))
        if piece.finish_reason:
            part = {"delta": {}} if self._chat else {"text": ""}
            choices.append(self._choice(piece.index, part, piece.finish_reason))
        return [self._event({"choices": [choice]}) for choice in choices]

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Events follow each other in one text."""
        return ["".join(chunks)]

    def progress(self) -> Mapping[str, Any] | None:
        """OpenAI's clients get no progress."""
        return None

    def last_chunks(self) -> list[Any]:
        """The token counts if they were asked for, and the end."""
        counts = [self._event({"choices": [], "usage": self._usage()})] if self._usage_wanted else []
        return [*counts, DONE]

    def output(self) -> dict[str, Any]:
        """The whole answer of a request that is not streamed."""
        collected, choices = self._collected, []
        for index, (text, reason) in enumerate(zip(collected.texts, collected.reasons, strict=True)):
            part: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append(self._choice(index, part, reason))
        return self._head() | {"object": self._object, "choices": choices, "usage": self._usage()}

    def _choice(self, index: int, part: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **part, "logprobs": None, "finish_reason": reason}

    def _event(self, content: Mapping[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._chat else self._object
        return f"data: {json.dumps({**self._head(), 'object': kind, **content}, ensure_ascii=False)}\n\n"

    def _head(self) -> dict[str, Any]:
        return self._id | {"model": self._collected.model}

    def _usage(self) -> dict[str, int]:
        prompt, new = self._collected.prompt_tokens, sum(self._collected.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class PassedAnswer:
    """Passes on the answer of a server that has OpenAI's routes itself, the events of a stream or the one object: a
    Responder."""

    def __init__(self) -> None:
        self.streams = True
        self._output: dict[str, Any] = {}

    def chunks(self, piece: str | dict[str, Any]) -> list[Any]:
        """Take an event of a stream, which is sent as it is, or the whole answer."""
        if isinstance(piece, str):
            return [piece]
        self.streams, self._output = False, piece
        return []

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Events follow each other in one text."""
        return ["".join(chunks)]

    def progress(self) -> Mapping[str, Any] | None:
        """OpenAI's clients get no progress."""
        return None

    def last_chunks(self) -> list[Any]:
        """Nothing: the server sends the end, too."""
        return []

    def output(self) -> dict[str, Any]:
        """The whole answer."""
        return self._output


def models(names: list[str], *, created: int) -> dict[str, Any]:
    """The answer to /v1/models."""
    listed = [{"id": name, "object": "model", "created": created, "owned_by": "modelstore"} for name in names]
    return {"object": "list", "data": listed}


def failed(error: JobError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = _TYPES.get(error.code, "server_error")
    return {"error": {"message": str(error), "type": kind, "code": error.code.value}}
