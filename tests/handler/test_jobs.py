"""The fields of a job, and its answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.answers import TextAnswer, TextDelta
from handler.errors import Code, JobError, not_served
from handler.jobs import Limits, Prompt, TextRequest, input_of, parse_text
from modelstore.settings import Settings

MODEL = "org/name"
LIMITS = Limits.of(Settings(root=Path("/")))


def parse(**data: Any) -> TextRequest:
    return parse_text(data, LIMITS)


def test_a_bare_prompt_gets_the_documented_defaults() -> None:
    request = parse(prompt="hi")
    assert request.sampling.parameters == {"max_tokens": 100, "temperature": 0.7, "top_p": 0.9}
    assert request.prompts == (Prompt("hi"),)
    assert (request.stream, request.listed, request.fit) == (False, False, True)


def test_every_field_is_taken() -> None:
    messages = [{"role": "user", "content": "hi", "name": "x"}]
    request = parse(
        messages=messages, max_tokens=2048, temperature=0, top_p=1, top_k=5, repetition_penalty=1.2, seed=7, stop="."
    )
    assert request.prompts == (Prompt(messages=({"role": "user", "content": "hi"},)),)
    assert request.sampling.parameters == {
        "max_tokens": 2048,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 5,
        "repetition_penalty": 1.2,
        "seed": 7,
        "stop": ["."],
    }
    assert not request.fit


def test_several_prompts_are_one_request() -> None:
    request = parse(prompts=["a", "b"], stream=True)
    assert request.prompts == (Prompt("a"), Prompt("b"))
    assert request.listed
    assert request.stream


def test_none_means_the_default_and_unknown_fields_are_ignored() -> None:
    assert parse(prompt="hi", max_tokens=None, temperature=None, stream=False, whatever=1) == parse(prompt="hi")


def test_a_whole_number_may_come_as_a_float() -> None:
    assert parse(prompt="hi", max_tokens=7.0).sampling.max_tokens == 7


def test_parts_of_text_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    assert parse(messages=[{"role": "user", "content": parts}]).prompts[0].messages[0]["content"] == "hello"
    with pytest.raises(JobError, match="type text alone"):
        parse(messages=[{"role": "user", "content": [{"type": "image_url"}]}])


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
        ({"prompt": "a", "stream": "yes"}, "stream must be true or false, not 'yes'"),
        ({"prompt": "a", "prompts": ["a"]}, "exactly one"),
        ({"prompts": []}, "prompts must be a list of 1 to 32 strings, not 0"),
        ({"prompts": ["a"] * 33}, "not 33"),
        ({"prompts": "a"}, "prompts must be a list"),
        ({"prompts": ["a", ""]}, r"prompts\[1\] must not be empty"),
        ({"prompts": ["a", 3]}, r"prompts\[1\] must be a string, not 3"),
        ({"prompt": "a", "top_k": -1}, "top_k must be an integer between 0 and 1000000, not -1"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must be a number at least 0.1"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "stop": ""}, "stop must be a string or at most 16 of them"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": [1]}, "stop"),
        ({"prompt": "a", "stop": {"a": 1}}, "stop"),
    ],
)
def test_bad_input_names_the_field_the_limit_and_the_value(data: dict[str, Any], names: str) -> None:
    with pytest.raises(JobError, match=names) as caught:
        parse(**data)
    assert caught.value.payload()["code"] == "INVALID_INPUT"


@pytest.mark.parametrize("job", [{}, {"input": None}, {"input": "hi"}, {"input": []}])
def test_a_job_without_an_input_object_is_invalid(job: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="input"):
        input_of(job, LIMITS)


def test_a_model_is_named_by_a_string() -> None:
    assert parse(prompt="a", model="org/other").model == "org/other"
    with pytest.raises(JobError, match="model must be a string, not 7"):
        parse(prompt="a", model=7)
    assert not_served("org/other", MODEL).code is Code.MODEL_NOT_ALLOWED


def test_limits_are_those_of_the_settings() -> None:
    small = replace(LIMITS, max_tokens=10, prompt_characters=3, prompts=1)
    assert parse_text({"prompt": "abc"}, small).sampling.max_tokens == 10, "the default is within the limit"
    for data, names in (
        ({"prompt": "abcd"}, "at most 3 characters, not 4"),
        ({"prompt": "abc", "max_tokens": 11}, "between 1 and 10, not 11"),
        ({"prompts": ["a", "b"]}, "1 to 1 strings, not 2"),
        ({"messages": [{"role": "user", "content": "ab"}] * 2}, "3 characters together, not 12"),
    ):
        with pytest.raises(JobError, match=names):
            parse_text(data, small)


def test_an_output_has_the_contracts_fields() -> None:
    answer = TextAnswer(parse(prompt="a"))
    answer.add(TextDelta(0, "text", 3, "stop", 1, MODEL))
    assert answer.output()["model"] == MODEL
    assert answer.output().keys() >= {"generated_text", "tokens_generated", "model", "parameters"}


def test_chunks_of_one_prompt_are_merged_while_it_goes_on() -> None:
    def chunk(index: int, token: str, *, finished: bool = False) -> dict[str, Any]:
        return {"index": index, "token": token, "finished": finished}

    chunks = [chunk(0, "a"), chunk(0, "b"), chunk(1, "c"), chunk(0, "d"), chunk(0, "", finished=True), chunk(1, "e")]
    assert [(one["index"], one["token"]) for one in TextAnswer(parse(prompt="a")).merge(chunks)] == [
        (0, "ab"),
        (1, "c"),
        (0, "d"),
        (0, ""),
        (1, "e"),
    ]
    assert chunks[0]["token"] == "a", "what was given stays as it is"


def test_an_error_without_text_does_not_vanish_in_the_sdk() -> None:
    assert JobError(Code.OOM, "").payload() == {"error": "OOM", "code": "OOM"}
