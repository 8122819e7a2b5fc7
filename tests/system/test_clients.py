"""The everyday of the clients that people have: `openai`, LangChain's ChatOpenAI and litellm, against a real worker under
the unmodified SDK, through the stand-in of RunPod."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import transformers as tf

from tests.handler.test_embedding import plain
from tests.support.hub import running_hub
from tests.support.models import write_model
from tests.support.runpod_api import ENDPOINT, KEY, RunPod
from tests.support.workers import serving, serving_http

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the clients' own

HELLO = [{"role": "user", "content": "hello world"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
# What a worker answers greedily is made of the prompt's own tokens, so that the template's parts can be seen
TEMPLATE = (
    "{% if tools %}capital{% endif %}{% for m in messages %} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} {% if thinking is defined and not thinking %}paris{% else %}what{% endif %}{% endif %}"
)


@pytest.fixture(scope="module", params=["queue", "http"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """OpenAI's routes of one worker, behind RunPod's queue and by itself: clients see no difference."""
    folder = tmp_path_factory.mktemp("clients")
    with running_hub(folder / "hub") as hub, RunPod().running() as runpod:
        model = hub.folder / "org" / "name"
        write_model(model, seed=1, context=512, ends=False)
        tokenizer = tf.AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(model)
        env = {"HF_ENDPOINT": hub.url, "MODELSTORE_ROOT": str(folder / "volume" / "modelstore"), "HF_HOME": str(folder)}
        env |= {"MODEL_ID": "org/name", "SERVED_MODEL_NAME": "gpt-4, chat"}
        if request.param == "queue":
            with serving(env | runpod.env):
                yield f"{runpod.url}/{ENDPOINT}/openai/v1"
        else:
            with serving_http(env) as url:
                yield f"{url}/v1"


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **more: Any) -> Any:
    asked = {"model": "org/name", "messages": HELLO, "temperature": 0, "max_tokens": 6} | more
    return client.chat.completions.create(**asked)


def text_of(chunks: Any, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_stream_has_the_whole_answer_and_its_usage(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 6
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "length"


def test_n_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    many = [chat(client, n=3, temperature=1.5, seed=5, max_tokens=12) for _again in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in many]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    assert many[0].usage.prompt_tokens == chat(client).usage.prompt_tokens, "the prompt counts once"
    chunks = list(chat(client, n=3, temperature=1.5, seed=5, max_tokens=12, stream=True))
    assert [text_of(chunks, index) for index in range(3)] == texts[0]


def test_a_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    words = chat(client).choices[0].message.content.split()
    stopped = chat(client, stop=[words[2]]).choices[0]
    assert stopped.finish_reason == "stop"
    assert words[2] not in stopped.message.content
    assert "".join(words).startswith("".join(stopped.message.content.split()))


def test_models_are_listed_and_each_name_is_served(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["org/name", "gpt-4", "chat"]
    answers = {chat(client, model=name).choices[0].message.content for name in names}
    assert len(answers) == 1


def test_errors_are_exceptions_with_status_and_body(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            chat(client, model="gpt-5", stream=stream)
        assert missing.value.code == "model_not_found"
        assert "org/name, gpt-4, chat" in missing.value.message
        with pytest.raises(openai.BadRequestError) as bad:
            chat(client, temperature=3, stream=stream)
        assert bad.value.type == "invalid_request_error"
        assert "temperature must be" in bad.value.message


def test_a_template_gets_its_variables_tools_and_the_last_message(client: openai.OpenAI) -> None:
    count = {
        name: chat(client, extra_body=body, **more).usage.prompt_tokens
        for name, body, more in (
            ("plain", {}, {}),
            ("thinking", {"chat_template_kwargs": {"thinking": False}}, {}),
            ("tools", {}, {"tools": [TOOL]}),
            ("no tools", {}, {"tools": [TOOL], "tool_choice": "none"}),
            ("no opening", {"add_generation_prompt": False}, {}),
            ("continued", {"continue_final_message": True}, {}),
        )
    }
    assert count["tools"] == count["plain"] + 1
    assert count["no tools"] == count["thinking"] == count["plain"]
    assert count["no opening"] == count["continued"] == count["plain"] - 1
    assert chat(client, extra_body={"chat_template_kwargs": {"thinking": False}}).choices != chat(client).choices


def test_log_probabilities_and_the_prompt_of_a_harness(client: openai.OpenAI) -> None:
    """As evaluation harnesses ask for the likelihood of a text: token ids, `echo`, one token or none more."""
    told = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(told) == 6
    assert all(len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob for token in told)
    ask = {"model": "org/name", "temperature": 0, "echo": True, "logprobs": 1}
    by_text = client.completions.create(prompt="hello world paris", max_tokens=0, **ask).choices[0]
    assert by_text.text == "hello world paris"
    assert by_text.logprobs.token_logprobs[0] is None
    assert len(by_text.logprobs.tokens) == 3
    ids = [[5, 6], [7]]
    more = client.completions.create(prompt=ids, max_tokens=1, **ask)
    assert [len(choice.logprobs.tokens) for choice in more.choices] == [3, 2]
    assert more.usage.prompt_tokens == 3


def test_many_at_once(base: str) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            asked = [
                client.chat.completions.create(model="chat", messages=HELLO, temperature=0, max_tokens=6)  # type: ignore[arg-type]
                for _ in range(24)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert len(set(asyncio.run(run()))) == 1


def test_langchain(base: str, client: openai.OpenAI) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model="org/name", base_url=base, api_key=KEY, temperature=0, max_tokens=6, max_retries=0
    )
    expected = chat(client).choices[0].message.content
    answer = model.invoke([("system", ""), ("human", "hello world")])
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["output_tokens"] == 6
    assert model.invoke("hello world").content == expected
    chunks = list(model.stream("hello world", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == expected
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [6]
    assert [each.content for each in model.batch(["hello world"] * 3)] == [expected] * 3
    assert asyncio.run(model.ainvoke("hello world")).content == expected
    stop = expected.split()[1]
    assert stop not in model.bind(stop=[stop]).invoke("hello world").content
    called = model.bind_tools([TOOL]).invoke("hello world")
    assert called.usage_metadata["input_tokens"] == model.invoke("hello world").usage_metadata["input_tokens"] + 1
    with pytest.raises(openai.BadRequestError, match="response_format is not served by the text engine; ENGINE=vllm"):
        model.with_structured_output({"title": "x", "type": "object", "properties": {}}).invoke("hello world")
    with pytest.raises(openai.NotFoundError, match="this worker serves org/name"):
        langchain.ChatOpenAI(model="x", base_url=base, api_key=KEY, max_retries=0).invoke("hello")


def test_litellm(base: str, client: openai.OpenAI) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its default is a download
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    ask = {
        "model": "openai/org/name", "messages": HELLO, "api_base": base, "api_key": KEY, "temperature": 0,
        "max_tokens": 6, "num_retries": 0,
    }  # fmt: skip
    expected = chat(client).choices[0].message.content
    whole = litellm.completion(**ask)
    assert whole.choices[0].message.content == expected
    assert whole.usage.completion_tokens == 6
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == expected
    assert litellm.completion(**ask, n=2, seed=3, stop=["zzz"]).choices[1].message.content == expected
    with pytest.raises(litellm.NotFoundError, match="this worker serves"):
        litellm.completion(**(ask | {"model": "openai/x"}))
    with pytest.raises(litellm.BadRequestError, match="whatever is not served"):
        litellm.completion(**ask, extra_body={"whatever": 1})


def test_embeddings_of_an_encoder_that_is_named_as_the_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("encoder")
    plain(folder / "model")
    texts = ["hello world", "paris"]
    env = {"MODEL_ID": f"file://{folder / 'model'}", "MODEL_DTYPE": "float32", "HF_HOME": str(folder)}
    with RunPod().running() as runpod, serving(env | runpod.env | {"MODELSTORE_ROOT": str(folder / "volume/store")}):
        base = f"{runpod.url}/{ENDPOINT}/openai/v1"
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            name = client.models.list().data[0].id
            made = client.embeddings.create(model=name, input=texts)
            vectors = [each.embedding for each in made.data]
            assert made.usage.total_tokens > 0
            with pytest.raises(openai.NotFoundError, match="this worker serves"):
                client.embeddings.create(model="text-embedding-3-small", input="x")
            with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
                client.chat.completions.create(model=name, messages=HELLO)  # type: ignore[arg-type]
        langchain = pytest.importorskip("langchain_openai")
        embeddings = langchain.OpenAIEmbeddings(
            model=name, base_url=base, api_key=KEY, check_embedding_ctx_length=False, max_retries=0
        )
        assert embeddings.embed_documents(texts) == vectors
        litellm = pytest.importorskip("litellm")
        other = litellm.embedding(model=f"openai/{name}", input=texts, api_base=base, api_key=KEY)
        assert [each["embedding"] for each in other.data] == [pytest.approx(vector, abs=1e-6) for vector in vectors]
