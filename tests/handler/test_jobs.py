"""The fields of a job, and its answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.answers import TextAnswer, TextDelta
from handler.errors import Code, JobError, not_served
from handler.jobs import Limits, TextRequest, input_of, parse_text
from handler.prompts import Prompt, TemplateOptions, parts_of_content, text_of_content
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
    assert request.prompts == (Prompt(messages=({"role": "user", "content": "hi", "name": "x"},)),)
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


def test_none_means_the_default() -> None:
    assert parse(prompt="hi", max_tokens=None, temperature=None, stream=False, whatever=None) == parse(prompt="hi")


def test_a_whole_number_may_come_as_a_float() -> None:
    assert parse(prompt="hi", max_tokens=7.0).sampling.max_tokens == 7


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}], "he\nllo"),
        ([{"type": "input_text", "text": "a"}, "b"], "a\nb"),
    ],
)
def test_contents_are_taken_as_openai_takes_them(content: Any, text: str) -> None:
    (prompt,) = parse(messages=[{"role": "user", "content": content}]).prompts
    (message,) = prompt.messages
    assert text_of_content(message["content"]) == text
    assert parts_of_content(message["content"]) == [
        {"type": "text", "text": each}
        for each in ([content] if isinstance(content, str) else text.split("\n") if text else [])
    ]


def test_a_call_of_a_tool_and_its_answer_reach_the_template() -> None:
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    (prompt,) = parse(messages=calls, tools=[{"type": "function"}]).prompts
    assert prompt.messages[0]["content"] == ""
    assert prompt.messages[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}, "as templates take them"
    assert prompt.messages[1] == calls[1]
    assert prompt.template.tools == ({"type": "function"},)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, TemplateOptions()),
        ({"chat_template_kwargs": {"enable_thinking": False}}, TemplateOptions(variables={"enable_thinking": False})),
        ({"reasoning_effort": "low"}, TemplateOptions(variables={"reasoning_effort": "low"})),
        (
            {"continue_final_message": True},
            TemplateOptions(continue_final_message=True, add_generation_prompt=False),
        ),
        ({"add_generation_prompt": False}, TemplateOptions(add_generation_prompt=False)),
        ({"tools": [{"a": 1}]}, TemplateOptions(tools=({"a": 1},))),
        ({"tools": [{"a": 1}], "tool_choice": "auto"}, TemplateOptions(tools=({"a": 1},))),
        ({"tools": [{"a": 1}], "tool_choice": "none"}, TemplateOptions()),
        ({"documents": [{"text": "x"}]}, TemplateOptions(documents=({"text": "x"},))),
    ],
)
def test_the_options_of_a_template_are_taken(fields: dict[str, Any], options: TemplateOptions) -> None:
    (prompt,) = parse(messages=[{"role": "user", "content": "hi"}], **fields).prompts
    assert prompt.template == options


def test_prompts_may_be_token_ids() -> None:
    assert parse(prompt=[1, 2]).prompts == (Prompt(tokens=(1, 2)),)
    assert not parse(prompt=[1, 2]).listed
    assert parse(prompt=[[1], "a"]).prompts == (Prompt(tokens=(1,)), Prompt("a"))
    assert parse(prompts=[[1], [2, 3]]).prompts == (Prompt(tokens=(1,)), Prompt(tokens=(2, 3)))
    assert parse(prompt=["a", "b"]).listed


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"seed": -1}, {}),
        ({"temperature": 1e-8}, {"temperature": 0.01}),
        ({"max_tokens": 5, "max_new_tokens": 5}, {"max_tokens": 5}),
        ({"model": ""}, {"model": ""}),
        ({"best_of": 1, "parallel_tool_calls": False, "response_format": {"type": "text", "json_schema": None}}, {}),
    ],
)
def test_values_that_clients_send_mean_what_they_mean_in_vllm(fields: dict[str, Any], plain: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert parse(messages=messages, **fields) == parse(messages=messages, **plain)


def test_n_answers_come_as_a_list() -> None:
    request = parse(prompt="a", n=2)
    assert request.prompts == (Prompt("a"), Prompt("a"))
    assert (request.listed, request.choices) == (True, 2)


def test_the_input_of_worker_vllm_means_what_it_means_there() -> None:
    params = {"max_tokens": 5, "temperature": 0, "top_k": -1, "stop": ["b"], "n": 2, "seed": None}
    request = parse(prompt="a", sampling_params=params)
    assert request.choices == 2
    assert request.sampling.parameters == {"max_tokens": 5, "temperature": 0.0, "top_k": 0, "stop": ["b"]}
    bare = parse(prompt="a", sampling_params={}).sampling
    assert (bare.temperature, bare.top_p, bare.top_k, bare.top_k_without_one) == (None, None, None, 0), "as in vLLM"
    assert parse(prompt="a", max_new_tokens=5).sampling.max_tokens == 5
    assert parse(prompt="a", top_k=-1).sampling.top_k == 0
    with pytest.raises(JobError, match="temperature is in sampling_params and beside them"):
        parse(prompt="a", temperature=1, sampling_params={"temperature": 0})
    with pytest.raises(JobError, match="guided_json is not served by the text engine"):
        parse(prompt="a", sampling_params={"guided_json": {}})


def test_every_way_to_choose_tokens_is_taken_and_repeated() -> None:
    fields: dict[str, Any] = {
        "min_p": 0.1, "presence_penalty": -1.5, "frequency_penalty": 2.0, "logit_bias": {"7": -100.0}, "min_tokens": 3,
        "stop_token_ids": [5], "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    parameters = parse(prompt="a", **fields).sampling.parameters
    assert {name: parameters[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": 0}, 0),
        ({"logprobs": 3}, 3),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
    ],
)
def test_log_probabilities_are_asked_for_in_either_form(fields: dict[str, Any], logprobs: int | None) -> None:
    assert parse(prompt="a", **fields).sampling.logprobs == logprobs


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
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content"),
        ({"prompt": "a", "max_tokens": 3, "max_new_tokens": 4}, "max_tokens and max_new_tokens are the same"),
        ({"prompt": "a", "tools": False}, "tools says something of a conversation"),
        ({"prompt": "a", "prompt_logprobs": 1}, "ENGINE=vllm serves it. Here, echo with logprobs"),
        ({"prompt": "a", "logit_bias": {"1": "a"}}, "logit_bias must be a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\] is 'image_url'"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 7}, "chat_template_kwargs"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 7}},
            "'messages' is none",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, "tool_choice needs tools"),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": [{}], "tool_choice": "required"},
            "ENGINE=vllm serves it",
        ),
        (
            {"messages": [{"role": "a", "content": ""}], "continue_final_message": True, "add_generation_prompt": True},
            "leave add_generation_prompt out",
        ),
        ({"messages": [{"role": 1, "content": "x"}]}, r"messages\[0\]\.role"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer between 1 and 2048, not 0"),
        ({"prompt": "a", "max_tokens": 2049}, "2049"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature must be a number at least 0 and at most 2, not -0.1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "stream": "yes"}, "stream must be true or false, not 'yes'"),
        ({"prompt": "a", "prompts": ["a"]}, "exactly one"),
        ({"prompts": []}, "prompts must be a list of 1 to 32 strings, not 0"),
        ({"prompts": ["a"] * 33}, "not 33"),
        ({"prompts": "a"}, "prompts must be a list of 1 to 32 strings"),
        ({"prompts": ["a", ""]}, r"prompts\[1\] must not be empty"),
        ({"prompts": ["a", 3]}, r"prompts\[1\] must be a string, not 3"),
        ({"prompt": "a", "top_k": -2}, "top_k must be an integer between -1 and 1000000, not -2"),
        ({"prompt": "a", "whatever": 1}, "whatever is not served"),
        ({"prompt": "a", "max_token": 1}, "max_token is not served; the nearest field that is: max_tokens"),
        ({"prompt": [1, -1]}, "prompt must be a list of at most 1000000 token ids"),
        ({"prompt": [1, True]}, "token ids"),
        ({"prompt": []}, "prompt must be a list of 1 to 32"),
        ({"prompts": [[]]}, r"prompts\[0\] must not be empty"),
        ({"prompt": "a", "min_p": 1.5}, "min_p"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must have token ids as its names, not 'x'"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias must be"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias must be an object"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids must be a list"),
        ({"prompt": "a", "min_tokens": 200}, "min_tokens must be an integer between 0 and 100"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"prompt": "a", "tools": [{}]}, "tools says something of a conversation"),
        ({"prompt": "a", "sampling_params": 7}, "sampling_params must be an object"),
        ({"prompt": "a", "n": 33}, "n must be"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must be a number at least 0.1"),
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
        input_of(job, 1000)


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
    assert JobError(Code.OOM, "x").payload() == {"error": "OOM: x", "code": "OOM"}, "the code is in the text"
