"""OpenAI's routes, as RunPod hands them over: {"openai_route": "/v1/chat/completions", "openai_input": {…}}.

Pure functions: a route's body to a text request, and its pieces to OpenAI's answers, whole or as server-sent events.
Served: chat/completions, completions and models; `openai_images.py` has the route for pictures. A field that would
change the answer and is not served is refused rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from handler.answers import TextAnswer, TextDelta, TokenLogprob, WholeAnswer
from handler.errors import Code, JobError, invalid, shown
from handler.fields import check_fields, unknown_field
from handler.jobs import AS_IN_VLLM, Limits, TextRequest, parse_completion
from handler.prompts import check_message_count, media_characters
from handler.values import flag, integer

CompletionRoute = Literal["chat/completions", "completions"]
TextRoute = CompletionRoute | Literal["models"]
R = TypeVar("R", bound=str)

_COMPLETION_TOKENS = 16  # OpenAI's default

# The routes that a server with OpenAI's routes is asked for. Not its administration: vLLM loads adapters by a path or a
# repo's name on such a route.
_PASSED_ON = frozenset(
    f"v1/{name}"
    for name in (
        *("chat/completions", "completions", "models", "responses", "embeddings", "pooling", "classify", "score"),
        *("rerank", "audio/transcriptions", "audio/translations"),
    )
)

TEXT_ROUTES: tuple[TextRoute, ...] = ("chat/completions", "completions", "models")

DONE = "data: [DONE]\n\n"

# The HTTP status, the type and the code of an error on OpenAI's routes
_ERRORS: Mapping[Code, tuple[int, str, str]] = {
    Code.INVALID_INPUT: (400, "invalid_request_error", Code.INVALID_INPUT),
    Code.MODEL_NOT_ALLOWED: (404, "invalid_request_error", "model_not_found"),
    Code.RESULT_TOO_LARGE: (413, "invalid_request_error", Code.RESULT_TOO_LARGE),
    Code.MODEL_UNAVAILABLE: (503, "server_error", Code.MODEL_UNAVAILABLE),
    Code.OOM: (503, "server_error", Code.OOM),
    Code.TIMEOUT: (504, "server_error", Code.TIMEOUT),
    Code.INTERNAL_ERROR: (500, "server_error", Code.INTERNAL_ERROR),
}


def is_request(data: Mapping[str, Any]) -> bool:
    """Whether a job's input is a request in OpenAI's form."""
    return any(data.get(name) is not None for name in ("openai_route", "openai_input", "route"))


def route_and_body(data: Mapping[str, Any], *, usual: str = "/v1/chat/completions") -> tuple[object, object]:
    """The route and the body of such an input, unchecked. Without a route it is the `usual` one: a conversation, as
    worker-vllm has it. Raises JobError for a field beside them."""
    by_route = data.get("openai_route") is None and data.get("openai_input") is None
    names = ("route", "body", "method") if by_route else ("openai_route", "openai_input")
    for name, value in data.items():
        if name not in names and value is not None:
            raise unknown_field(name, names)
    method, body = data.get("method"), data.get(names[1])
    if method is not None and method not in (("GET",) if not body else ("POST",)):
        raise invalid(f"method must be POST with a body, and GET without one, not {shown(method)}")
    route = data.get(names[0])
    return (usual if route is None else route), body


def _path_of(route: object) -> str:
    """A route without its query and the slashes around it; empty if it is no text."""
    return route.split("?")[0].strip("/") if isinstance(route, str) else ""


def parse_route(route: object, served: Sequence[R]) -> R:
    """The route that is asked for, among those that are `served`. Raises JobError."""
    path = _path_of(route)
    for name in served:
        if path == f"v1/{name}":
            return name
    listed = ", ".join(f"/v1/{name}" for name in served)
    raise invalid(f"openai_route must be one of {listed} here, not {shown(route)}")


def parse_request(route: object, body: object, limits: Limits) -> tuple[str, Mapping[str, Any] | None]:
    """A route and a body for a server that has OpenAI's routes itself, checked against our limits.

    A request without a body is a GET. Raises JobError.
    """
    path = _path_of(route)
    if path not in _PASSED_ON:
        raise invalid(f"openai_route must be one of OpenAI's routes, as in /v1/completions, not {shown(route)}")
    body = {} if body is None else checked_body(body)
    if not body:
        return f"/{path}", None
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if body.get(name) is not None:
            integer(body, name, 1, at_least=0, at_most=limits.max_tokens)
    choices = integer(body, "n", 1, at_least=1, at_most=limits.prompts)
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [body.get("prompt")]
    if isinstance(prompts[0] if prompts else None, str | list) and len(prompts) * choices > limits.prompts:
        raise invalid(f"n times the prompts must be at most {limits.prompts}, not {len(prompts) * choices}")
    sources = [body.get(name) for name in ("prompt", "messages", "input")]
    size = len(json.dumps(sources, ensure_ascii=False)) - media_characters(sources)
    if size > limits.prompt_characters:
        raise invalid(f"prompt, messages and input must have at most {limits.prompt_characters} characters, not {size}")
    if isinstance(messages := body.get("messages"), list):
        check_message_count(messages)
    return f"/{path}", body


def check_no_body(body: object) -> None:
    """Raise JobError if a route that takes no fields has some."""
    if body:
        raise invalid(f"/v1/models takes no fields: leave openai_input out, and not {shown(body)} in it")


def checked_body(body: object) -> Mapping[str, Any]:
    """`body`, which is an object. Raises JobError."""
    if not isinstance(body, dict):
        raise invalid("openai_input must be an object")
    return body


def parse_body(route: CompletionRoute, body: Mapping[str, Any], limits: Limits) -> TextRequest:
    """The request of a completion; `n` choices are as many prompts. Raises JobError."""
    check_fields(body, route)
    _check_stream_options(body.get("stream_options"))
    source = "messages" if route == "chat/completions" else "prompt"
    if body.get(source) is None:
        raise invalid(f"{source} must be given")
    if route == "chat/completions":
        flag(body, "logprobs")
    elif body.get("logprobs") is True:
        raise invalid("logprobs must be a number on this route, not True")
    tokens = limits.max_tokens if route == "chat/completions" else _COMPLETION_TOKENS
    return replace(parse_completion(body, limits, usual=replace(AS_IN_VLLM, max_tokens=tokens)), listed=True)


def _check_stream_options(options: object) -> None:
    if options is None:
        return
    if not isinstance(options, dict):
        raise invalid(f"stream_options must be an object, not {shown(options)}")
    flag(options, "include_usage")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation") and value not in (None, False):
            raise invalid(f"stream_options.{name} is not served by the text engine; ENGINE=vllm serves it")


def _wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with a chunk of token counts."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


class OpenAIAnswer:
    """Puts the pieces of one request in OpenAI's form: a Responder."""

    def __init__(
        self, route: CompletionRoute, request: TextRequest, body: Mapping[str, Any], *, job_id: str, created: int
    ) -> None:
        """`body`: the request as it came; `created`: seconds since 1970."""
        self.streams = request.stream
        self._usage_wanted = _wants_usage(body)
        self._chat = route == "chat/completions"
        self._request = request
        self._collected = TextAnswer(request)
        self._begun: set[int] = set()
        self._characters = [0 for _prompt in request.prompts]
        kind = "chat.completion" if self._chat else "text_completion"
        self._id = {"id": f"{'chatcmpl' if self._chat else 'cmpl'}-{job_id}", "created": created}
        self._object = kind

    def chunks(self, piece: TextDelta) -> list[Any]:
        """Take the next piece; returns its events of a stream."""
        self._collected.add(piece)
        if not self.streams:
            return []
        choices: list[dict[str, Any]] = []
        logprobs = self._logprobs(piece.index, piece.logprobs)
        if self._chat and piece.index not in self._begun:
            self._begun.add(piece.index)
            choices.append(self._choice(piece.index, {"delta": {"role": "assistant", "content": ""}}, None))
        if piece.text or piece.logprobs:
            part: dict[str, Any] = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
            choices.append(self._choice(piece.index, part, None, logprobs))
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

    def failed_chunks(self, error: JobError) -> list[Any]:
        """An event with the error, at which a client raises, and the end."""
        return error_events(error)

    def output(self) -> dict[str, Any]:
        """The whole answer of a request that is not streamed."""
        collected, choices = self._collected, []
        for index, (text, reason) in enumerate(zip(collected.texts, collected.reasons, strict=True)):
            part: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append(self._choice(index, part, reason, self._logprobs(index, collected.logprobs[index])))
        return self._head() | {"object": self._object, "choices": choices, "usage": self._usage()}

    def _choice(
        self, index: int, part: Mapping[str, Any], reason: str | None, logprobs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, **part, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The log probabilities of tokens that follow those of this choice so far; None if they were not asked for."""
        if self._request.sampling.logprobs is None:
            return None
        if self._chat:
            return {"content": [token.as_json() for token in tokens]}
        offsets = []
        for token in tokens:
            offsets.append(self._characters[index])
            self._characters[index] += len(token.token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else _top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _event(self, content: Mapping[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._chat else self._object
        return f"data: {json.dumps({**self._head(), 'object': kind, **content}, ensure_ascii=False)}\n\n"

    def _head(self) -> dict[str, Any]:
        return self._id | {"model": self._collected.model}

    def _usage(self) -> dict[str, int]:
        prompt, new = self._collected.prompt_tokens, sum(self._collected.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class PassedAnswer(WholeAnswer):
    """Passes on the answer of a server that has OpenAI's routes itself, the events of a stream, with their end, or the
    one object: a Responder."""

    streams = True

    def chunks(self, piece: str | dict[str, Any]) -> list[Any]:
        """Take an event of a stream, which is sent as it is, or the whole answer."""
        if isinstance(piece, str):
            return [piece]
        self.streams = False
        return super().chunks(piece)

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Events follow each other in one text."""
        return ["".join(chunks)]

    def failed_chunks(self, error: JobError) -> list[Any]:
        """An event with the error, at which a client raises, and the end."""
        return error_events(error)


def models(names: Sequence[str], *, created: int) -> dict[str, Any]:
    """The answer to /v1/models."""
    listed = [{"id": name, "object": "model", "created": created, "owned_by": "modelstore"} for name in names]
    return {"object": "list", "data": listed}


def _top(token: TokenLogprob) -> dict[str, float | None]:
    """The alternatives to a token, and itself; of several with the same text the most likely one."""
    return {**dict(reversed(token.top)), token.token: token.logprob}


def failed(error: JobError) -> dict[str, str]:
    """The handler's return value for an error. RunPod takes a text alone as a job's error: this one is OpenAI's error
    object as JSON, with the HTTP status that it has there."""
    return {"error": json.dumps(_error_object(error) | {"status": status_of(error)}), "code": error.code.value}


def error_body(error: JobError) -> dict[str, Any]:
    """The body of an answer over HTTP that is an error."""
    return {"error": _error_object(error)}


def status_of(error: JobError) -> int:
    """The HTTP status of an error."""
    status, _kind, _code = _ERRORS[error.code]
    return status


def error_events(error: JobError) -> list[str]:
    """The end of a stream that fails midway."""
    return [f"data: {json.dumps({'error': _error_object(error)})}\n\n", DONE]


def _error_object(error: JobError) -> dict[str, Any]:
    _status, kind, code = _ERRORS[error.code]
    return {"message": str(error) or error.code.value, "type": kind, "param": None, "code": str(code)}
