"""OpenAI's bodies to requests, and pieces to its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from handler.answers import TextDelta, TokenLogprob
from handler.errors import Code, JobError
from handler.jobs import Limits, TextRequest
from handler.openai_routes import (
    TEXT_ROUTES,
    CompletionRoute,
    OpenAIAnswer,
    checked_body,
    failed,
    is_request,
    models,
    parse_body,
    parse_request,
    parse_route,
    route_and_body,
)
from handler.prompts import Prompt, unparsed_messages
from modelstore.settings import Settings

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
LIMITS = Limits.of(Settings(root=Path("/"), max_prompts=4))


def answer(route: CompletionRoute, request: TextRequest, body: Mapping[str, Any] | None = None) -> OpenAIAnswer:
    return OpenAIAnswer(route, request, body or {}, job_id="7", created=1)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "v1/chat/completions/", "/v1/chat/completions?x=1"])
def test_a_route_may_be_written_in_several_ways(route: str) -> None:
    assert parse_route(route, TEXT_ROUTES) == "chat/completions"


@pytest.mark.parametrize("route", ["/v1/embeddings", "", None, 7, "/chat/completions"])
def test_a_route_that_is_not_served_is_an_error(route: object) -> None:
    with pytest.raises(JobError, match="openai_route must be"):
        parse_route(route, TEXT_ROUTES)


def test_defaults_are_openais() -> None:
    chat = parse_body("chat/completions", CHAT, LIMITS)
    assert (chat.sampling.temperature, chat.sampling.top_p, chat.sampling.max_tokens) == (None, None, 2048)
    assert chat.sampling.top_k_without_one == 0, "the model's own, else none"
    assert chat.fit, "as long as the context allows"
    text = parse_body("completions", {"prompt": "a"}, LIMITS)
    assert text.sampling.max_tokens == 16
    assert text.prompts == (Prompt("a"),)


def test_the_fields_of_a_job_are_taken() -> None:
    body = CHAT | {"max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["x"], "stream": True}
    request = parse_body("chat/completions", body, LIMITS)
    assert request.sampling.parameters == {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "seed": 3, "stop": ["x"]}
    assert request.stream
    assert not request.fit


def test_choices_are_as_many_prompts() -> None:
    request = parse_body("completions", {"prompt": ["a", "b"], "n": 2}, LIMITS)
    assert [prompt.text for prompt in request.prompts] == ["a", "a", "b", "b"]
    assert request.choices == 2
    with pytest.raises(JobError, match="at most 4, not 6"):
        parse_body("completions", {"prompt": ["a", "b"], "n": 3}, LIMITS)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"logprobs": 2}, "logprobs must be true or false"),
        ({"response_format": {"type": "json_object"}}, "response_format is not served by the text engine; ENGINE=vllm"),
        ({"functions": [{}]}, "functions is not served by the text engine: send tools"),
        ({"whatever": 1}, "whatever is not served"),
        ({"prompt": "a"}, "prompt is not served"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"n": 0}, "n must be an integer between 1 and 4"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"stream": 1}, "stream"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_and_not_ignored(more: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        parse_body("chat/completions", CHAT | more, LIMITS)


def test_fields_without_effect_may_be_there() -> None:
    more = {
        "frequency_penalty": 0, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "user": "me",
        "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True, "length_penalty": 1,
        "stream_options": {"include_obfuscation": True}, "whatever": None,
    }  # fmt: skip
    assert parse_body("chat/completions", CHAT | more, LIMITS) == parse_body("chat/completions", CHAT, LIMITS)


@pytest.mark.parametrize("body", [None, [], "x"])
def test_a_body_is_an_object(body: object) -> None:
    with pytest.raises(JobError, match="openai_input must be an object"):
        checked_body(body)


def test_a_whole_answer() -> None:
    request = parse_body("completions", {"prompt": ["a", "b"]}, LIMITS)
    whole = answer("completions", request)
    for piece in (TextDelta(1, "y", 1, "length", 3), TextDelta(0, "x", 2), TextDelta(0, "z", 1, "stop", 2)):
        whole.chunks(piece)
    output = whole.output()
    assert output["id"] == "cmpl-7"
    assert output["object"] == "text_completion"
    assert [(c["index"], c["text"], c["finish_reason"]) for c in output["choices"]] == [
        (0, "xz", "stop"),
        (1, "y", "length"),
    ]
    assert output["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def test_a_stream_begins_with_the_role_and_ends_with_the_reason_and_the_usage() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    stream = answer("chat/completions", parse_body("chat/completions", body, LIMITS), body)
    events: list[str] = []
    for piece in (TextDelta(0, "é", 1), TextDelta(0, "x", 1, "stop", 4)):
        events += stream.chunks(piece)
    events += stream.last_chunks()
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    assert events.pop() == "data: [DONE]\n\n"
    said = [json.loads(event[6:]) for event in events]
    assert {one["object"] for one in said} == {"chat.completion.chunk"}
    deltas = [one["choices"][0]["delta"] for one in said if one["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "é"}, {"content": "x"}, {}]
    assert [one["choices"][0]["finish_reason"] for one in said if one["choices"]] == [None, None, None, "stop"]
    assert said[-1]["usage"]["total_tokens"] == 6


def test_models_and_errors() -> None:
    assert models(["org/name"], created=1)["data"][0] == {
        "id": "org/name",
        "object": "model",
        "created": 1,
        "owned_by": "modelstore",
    }
    with pytest.raises(JobError) as caught:
        parse_body("completions", {}, LIMITS)
    said = failed(caught.value)
    assert said["code"] == "INVALID_INPUT"
    error = json.loads(said["error"])
    assert (error["type"], error["code"], error["status"]) == ("invalid_request_error", "INVALID_INPUT", 400)


@pytest.mark.parametrize("code", Code)
def test_every_code_has_a_status(code: Code) -> None:
    error = json.loads(failed(JobError(code, "x"))["error"])
    assert 400 <= error["status"] < 600
    assert error["message"] == "x"


def test_log_probabilities_have_openais_two_forms() -> None:
    tokens = (TokenLogprob("a", None), TokenLogprob(" b", -0.5, ((" c", -0.1), (" b", -2.0))))
    body = {"prompt": "a", "echo": True, "logprobs": 1}
    whole = answer("completions", parse_body("completions", body, LIMITS), body)
    whole.chunks(TextDelta(0, "a b", 1, "stop", 1, "org/name", tokens))
    assert whole.output()["choices"][0]["logprobs"] == {
        "tokens": ["a", " b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {" b": -0.5, " c": -0.1}],
        "text_offset": [0, 1],
    }
    asked = CHAT | {"logprobs": True, "top_logprobs": 1, "stream": True}
    stream = answer("chat/completions", parse_body("chat/completions", asked, LIMITS), asked)
    events = stream.chunks(TextDelta(0, " b", 1, "stop", 1, "org/name", tokens[1:]))
    told = [json.loads(event[6:])["choices"][0]["logprobs"] for event in events]
    assert [one for one in told if one] == [
        {
            "content": [
                {
                    "token": " b", "logprob": -0.5, "bytes": [32, 98],
                    "top_logprobs": [
                        {"token": " c", "logprob": -0.1, "bytes": [32, 99]},
                        {"token": " b", "logprob": -2.0, "bytes": [32, 98]},
                    ],
                }
            ]
        }
    ]  # fmt: skip


def test_a_stream_that_fails_ends_with_an_error_and_the_end() -> None:
    body = CHAT | {"stream": True}
    stream = answer("chat/completions", parse_body("chat/completions", body, LIMITS), body)
    error, end = stream.failed_chunks(JobError(Code.TIMEOUT, "late"))
    assert json.loads(error[6:])["error"]["message"] == "late"
    assert end == "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("data", "route", "body"),
    [
        ({"openai_route": "/v1/models"}, "/v1/models", None),
        ({"openai_route": "/v1/completions", "openai_input": CHAT}, "/v1/completions", CHAT),
        ({"openai_input": CHAT}, "/v1/chat/completions", CHAT),
        ({"route": "/v1/completions", "body": CHAT, "method": "POST"}, "/v1/completions", CHAT),
        ({"route": "/v1/models", "method": "GET"}, "/v1/models", None),
    ],
)
def test_a_request_comes_as_runpod_or_as_worker_vllm_writes_it(
    data: dict[str, Any], route: str, body: dict[str, Any] | None
) -> None:
    assert is_request(data)
    assert route_and_body(data) == (route, body)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"openai_route": "/v1/models", "prompt": "a"}, "prompt is not served"),
        ({"route": "/v1/models", "method": "DELETE"}, "method must be"),
    ],
)
def test_a_field_beside_a_request_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        route_and_body(data)


@pytest.mark.parametrize("route", ["/v1/completions", "v1/responses/", "/v1/models?x=1"])
def test_a_server_of_its_own_gets_any_route_of_openais(route: str) -> None:
    path, body = parse_request(route, None, LIMITS)
    assert path == f"/{route.split('?')[0].strip('/')}"
    assert body is None
    assert parse_request(route, CHAT, LIMITS)[1] == CHAT


@pytest.mark.parametrize(
    "route", ["/metrics", "", None, "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1", "/v1/a\nb", "http://host/v1/x"]
)
def test_a_server_of_its_own_gets_nothing_but_openais_routes(route: object) -> None:
    with pytest.raises(JobError, match="one of OpenAI's routes"):
        parse_request(route, None, LIMITS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (CHAT | {"max_tokens": 5000}, "max_tokens"),
        (CHAT | {"max_completion_tokens": 5000}, "max_completion_tokens"),
        (CHAT | {"n": 5}, "n must be"),
        ({"prompt": ["a"] * 3, "n": 2}, "at most 4, not 6"),
        ({"prompt": [[1], [2], [3], [4], [5]]}, "at most 4, not 5"),
        ({"prompt": "x" * 2_000_000}, "at most 1000000 characters"),
        ("x", "openai_input must be an object"),
    ],
)
def test_limits_hold_for_a_server_of_its_own_too(body: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        parse_request("/v1/completions", body, LIMITS)


PICTURES = (
    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + "A" * 1_500_000}},
    {"type": "input_image", "image_url": "data:image/jpeg;base64," + "A" * 1_500_000},
    {"type": "input_audio", "input_audio": {"data": "A" * 1_500_000, "format": "wav"}},
)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: str(picture["type"]))
def test_pictures_are_no_characters_of_a_prompt(picture: dict[str, Any]) -> None:
    """For a server that reads them. A text as long is one, wherever it stands."""
    conversation = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]}]
    for route, name in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        assert parse_request(route, {name: conversation}, LIMITS)[1] == {name: conversation}
    assert unparsed_messages(conversation, 100) == tuple(conversation)
    deep: Any = "a"
    for _ in range(600):
        deep = [deep]
    assert parse_request("/v1/chat/completions", {"messages": [{"role": "user", "content": deep}]}, LIMITS)
    long = "A" * 1_500_000
    for part in (
        {"type": "text", "text": long},
        {"type": "text", "text": "a", "url": long},
        {"type": "x", "text": long},
    ):
        with pytest.raises(JobError, match="at most"):
            unparsed_messages([{"role": "user", "content": [part]}], LIMITS.prompt_characters)
        with pytest.raises(JobError, match="at most"):
            parse_request("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}, LIMITS)
