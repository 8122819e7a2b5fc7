"""The table of fields against the code that reads them, against the page, and against the clients' own types."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from handler.errors import Code, JobError
from handler.fields import FIELDS, Route, check_server_fields
from handler.jobs import Limits, TextRequest, parse_text
from handler.openai_routes import OpenAIAnswer, parse_body
from modelstore.settings import Settings
from scripts.dev.field_table import MIGRATION_PAGE, PAGE, WORKER_VLLM_FIELDS, table, worker_vllm_table

LIMITS = Limits.of(Settings(root=Path("/")))
MESSAGES = [{"role": "user", "content": "hi"}]
SOURCE: dict[Route, dict[str, Any]] = {
    "native": {"messages": MESSAGES},
    "chat/completions": {"messages": MESSAGES},
    "completions": {"prompt": "hi"},
}
# A value of each field that is served, which changes the request; those that need another one beside them have it.
SERVED: dict[str, dict[str, Any]] = {
    "model": {"model": "org/other"}, "sampling_params": {"sampling_params": {"max_tokens": 3}},
    "add_generation_prompt": {"add_generation_prompt": False}, "continue_final_message": {"continue_final_message": True},
    "chat_template_kwargs": {"chat_template_kwargs": {"x": 1}}, "reasoning_effort": {"reasoning_effort": "low"},
    "tools": {"tools": [{"type": "function"}]}, "documents": {"documents": [{"text": "x"}]},
    "add_special_tokens": {"add_special_tokens": False}, "temperature": {"temperature": 0.3}, "top_p": {"top_p": 0.3},
    "top_k": {"top_k": 3}, "min_p": {"min_p": 0.3}, "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 0.3}, "frequency_penalty": {"frequency_penalty": 0.3},
    "logit_bias": {"logit_bias": {"3": 1}}, "seed": {"seed": 3}, "max_tokens": {"max_tokens": 3},
    "max_completion_tokens": {"max_completion_tokens": 3}, "max_new_tokens": {"max_new_tokens": 3},
    "min_tokens": {"min_tokens": 3}, "stop": {"stop": "x"}, "stop_token_ids": {"stop_token_ids": [3]},
    "ignore_eos": {"ignore_eos": True}, "stream": {"stream": True}, "n": {"n": 2}, "echo": {"echo": True},
    "logprobs": {"logprobs": True}, "skip_special_tokens": {"skip_special_tokens": False},
}  # fmt: skip
ON = [(name, route) for name, field in FIELDS.items() for route in field.routes]


def parsed(route: Route, **more: Any) -> TextRequest:
    body = {**SOURCE[route], **more}
    return parse_text(body, LIMITS) if route == "native" else parse_body(route, body, LIMITS)


def test_the_page_shows_the_table_of_the_code() -> None:
    assert f"<!-- fields -->\n{table()}<!-- /fields -->" in PAGE.read_text(), "run scripts/dev/field_table.py"


@pytest.mark.parametrize(("name", "route"), [(n, r) for n, r in ON if FIELDS[n].text == "served"])
def test_a_field_that_is_served_changes_the_request(name: str, route: Route) -> None:
    if name in ("prompt", "prompts", "messages"):
        assert parse_text({name: {"prompt": "a", "prompts": ["a"], "messages": MESSAGES}[name]}, LIMITS).prompts
    elif name == "stream_options":
        usage = {"include_usage": True}
        body = SOURCE[route] | {"stream": True}
        ends = []
        for more in ({}, {"stream_options": usage}):
            assert route != "native"
            request = parse_body(route, body | more, LIMITS)
            ends.append(OpenAIAnswer(route, request, body | more, job_id="1", created=1).last_chunks())
        assert len(ends[1]) == len(ends[0]) + 1
    elif name == "tool_choice":
        tools = [{"type": "function"}]
        assert parsed(route, tools=tools, tool_choice="none") != parsed(route, tools=tools, tool_choice="auto")
    elif name == "top_logprobs":
        assert parsed(route, logprobs=True, top_logprobs=3) != parsed(route, logprobs=True)
    else:
        value = {"logprobs": 0} if (name, route) == ("logprobs", "completions") else SERVED[name]
        assert parsed(route, **value) != parsed(route)


@pytest.mark.parametrize(("name", "route"), [(n, r) for n, r in ON if FIELDS[n].text != "served"])
def test_a_field_that_is_not_served_changes_nothing_or_is_refused_by_its_name(name: str, route: Route) -> None:
    field = FIELDS[name]
    for value in ("x", 7, ["x"], {"x": 1}, True, 0.5):
        if field.text == "harmless":
            assert parsed(route, **{name: value}) == parsed(route)
        elif value not in field.neutral:
            with pytest.raises(JobError, match=f"^{name} is not served by the text engine") as caught:
                parsed(route, **{name: value})
            assert caught.value.code is Code.INVALID_INPUT
            assert ("ENGINE=vllm serves it" in str(caught.value)) == (not field.replaced)
    for value in (*field.neutral, None):
        assert parsed(route, **{name: value}) == parsed(route)


@pytest.mark.parametrize("route", SOURCE)
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_another_route_is_refused(name: str, route: Route) -> None:
    if route not in FIELDS[name].routes:
        with pytest.raises(JobError, match=f"^{name} is not served"):
            parsed(route, **{name: "x"})


def keys(*types: Any) -> set[str]:
    return {name for each in types for name in typing.get_type_hints(each)}


def test_every_field_of_openais_types_is_in_the_table() -> None:
    """Those of the library's version here; a new one fails this test, and is then decided on."""
    chat = keys(
        chat_create_params.CompletionCreateParamsNonStreaming, chat_create_params.CompletionCreateParamsStreaming
    )
    text = keys(
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    )
    assert {name for name in chat if "chat/completions" not in getattr(FIELDS.get(name), "routes", ())} == set()
    assert {name for name in text if "completions" not in getattr(FIELDS.get(name), "routes", ())} == set()


def test_every_field_of_worker_vllms_input_is_in_the_tables() -> None:
    assert [name for name in WORKER_VLLM_FIELDS if "native" not in getattr(FIELDS.get(name), "routes", ())] == []
    page = MIGRATION_PAGE.read_text()
    assert f"<!-- worker-vllm fields -->\n{worker_vllm_table()}<!-- /worker-vllm fields -->" in page


def test_a_server_says_itself_which_fields_it_takes() -> None:
    known = {"messages", "temperature", "structured_outputs"}
    check_server_fields(
        {"messages": [], "structured_outputs": {}, "user": "me", "gone": None}, known, "vLLM", native=False
    )
    check_server_fields({"sampling_params": {}, "max_new_tokens": 1, "prompts": []}, known, "vLLM", native=True)
    neutral = {"apply_chat_template": False, "best_of": 1, "early_stopping": False, "detokenize": True}
    check_server_fields(neutral, known, "vLLM", native=True)
    for data, native, words in (
        ({"use_beam_search": True}, True, "use_beam_search is served by this vLLM on OpenAI's routes alone"),
        ({"temprature": 1}, False, "temprature is not served here; the fields that are: .*temperature"),
        ({"max_new_tokens": 1}, False, "max_new_tokens is not served here"),
        ({"guided_json": {}}, True, "guided_json is not served by this vLLM: vLLM takes structured_outputs instead"),
    ):
        with pytest.raises(JobError, match=words):
            check_server_fields(data, known, "vLLM", native=native)
