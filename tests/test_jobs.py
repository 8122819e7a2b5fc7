"""What a job may ask, and what it gets back."""

from __future__ import annotations

from typing import Any

import pytest

from handler.jobs import Code, Completion, JobError, TextRequest, completed, parse_job

MODEL = "org/name"


def parse(**data: Any) -> TextRequest:
    return parse_job({"id": "1", "input": data}, model=MODEL)


def test_a_bare_prompt_gets_the_documented_defaults() -> None:
    request = parse(prompt="hi")
    assert request.parameters == {"max_tokens": 100, "temperature": 0.7, "top_p": 0.9}
    assert request.prompt == "hi"


def test_every_field_is_taken() -> None:
    request = parse(messages=[{"role": "user", "content": "hi", "name": "x"}], max_tokens=2048, temperature=0, top_p=1)
    assert request.messages == ({"role": "user", "content": "hi"},)
    assert request.parameters == {"max_tokens": 2048, "temperature": 0.0, "top_p": 1.0}


def test_none_means_the_default_and_unknown_fields_are_ignored() -> None:
    assert parse(prompt="hi", max_tokens=None, temperature=None, stream=False, whatever=1) == parse(prompt="hi")


def test_a_whole_number_may_come_as_a_float() -> None:
    assert parse(prompt="hi", max_tokens=7.0).max_tokens == 7


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "exactly one"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt must be a string, not 7"),
        ({"prompt": "x" * 1_000_001}, "at most 1000000 characters, not 1000001"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, r"messages\[0\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content"),
        ({"messages": [{"role": 1, "content": "x"}]}, r"messages\[0\]\.role"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer between 1 and 2048, not 0"),
        ({"prompt": "a", "max_tokens": 2049}, "2049"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature must be a number at least 0 and at most 2, not -0.1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": 1e-300}, "at least 0.01, not 1e-300"),
        ({"prompt": "a", "top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompts": ["a"]}, "prompts"),
    ],
)
def test_bad_input_names_the_field_the_limit_and_what_was_given(data: dict[str, Any], names: str) -> None:
    with pytest.raises(JobError, match=names) as caught:
        parse(**data)
    assert caught.value.payload()["code"] == "INVALID_INPUT"


@pytest.mark.parametrize("job", [{}, {"input": None}, {"input": "hi"}, {"input": []}])
def test_a_job_without_an_input_object_is_invalid(job: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="input"):
        parse_job(job, model=MODEL)


def test_another_model_is_not_allowed() -> None:
    assert parse(prompt="a", model=MODEL).prompt == "a"
    with pytest.raises(JobError) as caught:
        parse(prompt="a", model="org/other")
    assert caught.value.code is Code.MODEL_NOT_ALLOWED


def test_an_output_has_the_contracts_fields() -> None:
    output = completed(Completion("text", 3), parse(prompt="a"), model=MODEL)
    assert output.keys() == {"generated_text", "tokens_generated", "model", "parameters"}


def test_an_error_without_text_does_not_vanish_in_the_sdk() -> None:
    assert JobError(Code.OOM, "").payload() == {"error": "OOM", "code": "OOM"}
