"""Adapters beside the model: answers are peft's own, in one batch, and none is lost when an adapter is exchanged."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from handler.alias_follower import AdapterFollower
from handler.engines import ServesAdapters
from handler.engines.multi import MultiModelEngine
from handler.engines.text import TextEngine
from handler.errors import JobError
from handler.jobs import Limits, parse_text
from handler.worker import Worker
from modelstore.errors import ModelStoreError, NotServable
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import history
from modelstore.warmstart import begin
from tests.support.adapters import change_config, write_adapter
from tests.support.hub import Hub
from tests.support.models import write_model

PROMPT = "hello world what is"


@pytest.fixture
def settings(hub: Hub, store: ModelStore) -> Settings:
    write_model(hub.folder / "org" / "name", seed=1, ends=False)
    for number, name in enumerate(("one", "two", "three"), 2):
        write_adapter(hub.folder / "org" / name, hub.folder / "org" / "name", seed=number)
    adapters = {name: parse_reference(f"org/{name}") for name in ("one", "two")}
    return replace(store.settings, model=parse_reference("org/name"), adapters=adapters)


@pytest.fixture
def started() -> Iterator[list[TextEngine]]:
    engines: list[TextEngine] = []
    yield engines
    for engine in engines:
        engine.close()


def start(settings: Settings, started: list[TextEngine]) -> TextEngine:
    started.append(begin(settings).load(TextEngine.load))
    return started[-1]


def expected(hub: Hub, adapter: str | None, tokens: int = 12) -> str:
    """The answer of transformers and peft by themselves."""
    folder = hub.folder / "org"
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "name", dtype=torch.float16)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folder / adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder / "name")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(made[0][ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False))


async def answer(engine: TextEngine | MultiModelEngine, model: str | None, tokens: int = 12) -> tuple[str, str]:
    """A whole answer, and the model that it says it is from."""
    data: dict[str, Any] = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    request = replace(parse_text(data, Limits.of(Settings(root=Path("/")))), model=model)
    pieces = [piece async for piece in engine.generate(request)]
    return "".join(piece.text for piece in pieces).strip(), pieces[0].model


def together(engine: TextEngine | MultiModelEngine, *models: str | None) -> list[tuple[str, str]]:
    async def ask() -> list[tuple[str, str]]:
        return await asyncio.gather(*(answer(engine, model) for model in models))

    return asyncio.run(ask())


def test_each_job_has_the_answer_of_its_adapter_in_one_batch(
    hub: Hub, settings: Settings, started: list[TextEngine]
) -> None:
    engine = start(settings, started)
    right = {name: expected(hub, name).strip() for name in (None, "one", "two")}
    assert len(set(right.values())) == 3
    models = [None, "one", "two", "one", None, "two"]
    assert together(engine, *models) == [(right[name], name or "org/name") for name in models]
    assert set(engine.status()["adapters"]) == {"one", "two"}


def test_a_worker_lists_them_and_answers_on_openais_routes(
    hub: Hub, settings: Settings, started: list[TextEngine]
) -> None:
    engine = MultiModelEngine(start(settings, started), settings, lambda _settings: pytest.fail("nothing to load"))
    worker = Worker(engine, settings)

    def ask(**fields: Any) -> Any:
        return asyncio.run(worker.handle({"id": "1", "input": fields}))

    listed = ask(openai_route="/v1/models")
    assert [model["id"] for model in listed["data"]] == ["org/name", "one", "two"]
    body = {"model": "two", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    completion = ask(openai_route="/v1/completions", openai_input=body)
    assert completion["model"] == "two"
    assert completion["choices"][0]["text"].strip() == expected(hub, "two").strip()
    native = ask(prompt=PROMPT, model="one", max_tokens=12, temperature=0)
    assert native["generated_text"].strip() == expected(hub, "one").strip()
    assert native["model"] == "one"
    unknown = ask(prompt=PROMPT, model="three")
    assert "org/name, one, two" in str(unknown["error"])


def test_log_probabilities_of_a_prompt_are_those_of_its_adapter(settings: Settings, started: list[TextEngine]) -> None:
    engine = start(settings, started)
    fields = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}

    async def first(model: str | None) -> list[float | None]:
        request = replace(parse_text(fields, Limits.of(settings)), model=model, echo=True)
        return [each.logprob async for piece in engine.generate(request) for each in piece.logprobs]

    base, one = asyncio.run(first(None)), asyncio.run(first("one"))
    assert len(base) == len(one) > 2
    assert base[1:] != one[1:]


def test_an_alias_that_is_repointed_changes_new_answers_and_no_running_one(
    hub: Hub, settings: Settings, store: ModelStore, started: list[TextEngine]
) -> None:
    store.set_alias("style", "org/one", dtype="keep")
    settings = replace(settings, adapters={"style": parse_reference("@style")})
    engine = start(settings, started)
    assert isinstance(engine, ServesAdapters)
    follower = AdapterFollower(engine, settings, "style")
    follower.look()
    long = 40
    right = {name: (expected(hub, name, long).strip(), "style") for name in ("one", "two")}

    async def across_the_exchange() -> list[tuple[str, str]]:
        running = [asyncio.create_task(answer(engine, "style", long)) for _job in range(3)]
        await asyncio.sleep(0.05)
        store.set_alias("style", "org/two", dtype="keep")
        exchange = asyncio.get_running_loop().run_in_executor(None, follower.look)
        during = [asyncio.create_task(answer(engine, "style", long)) for _job in range(3)]
        await exchange
        after = await answer(engine, "style", long)
        assert after == right["two"]
        return await asyncio.gather(*running, *during)

    for one in asyncio.run(across_the_exchange()):
        assert one in right.values()
    assert engine.adapter("style").repo_id == "org/two"
    (serving,) = [engine._serving.batcher]
    deadline = time.monotonic() + 5
    while serving._retired and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(serving._adapters._peft.peft_config) == 1  # type: ignore[union-attr]
    (record,) = [each for each in history.starts(store.layout, limit=9) if each["kind"] == "swap"]
    assert record["model"] == "@style"


def test_an_adapter_that_does_not_fit_leaves_the_one_before(
    hub: Hub, settings: Settings, store: ModelStore, started: list[TextEngine]
) -> None:
    store.set_alias("style", "org/one", dtype="keep")
    settings = replace(settings, adapters={"style": parse_reference("@style")})
    engine = start(settings, started)
    change_config(hub.folder / "org" / "three", target_modules=["no_such_module"])
    store.set_alias("style", "org/three", dtype="keep")
    AdapterFollower(engine, settings, "style").look()
    assert together(engine, "style") == [(expected(hub, "one").strip(), "style")]
    (record,) = [each for each in history.starts(store.layout, limit=9) if each["kind"] == "swap"]
    assert "does not fit the model" in record["error"]


def break_it(folder: Path, how: str) -> None:
    if how == "other modules":
        change_config(folder, target_modules=["no_such_module"])
    elif how == "fewer modules":
        change_config(folder, target_modules=["q_proj"])
    elif how == "DoRA":
        change_config(folder, use_dora=True)
    elif how == "another base":
        change_config(folder, base_model_name_or_path="org/other")
    elif how == "another rank":
        change_config(folder, r=7)


@pytest.mark.parametrize("how", ["other modules", "fewer modules", "DoRA", "another base", "another rank"])
def test_a_start_with_an_adapter_that_does_not_fit_says_so(
    hub: Hub, settings: Settings, started: list[TextEngine], how: str
) -> None:
    break_it(hub.folder / "org" / "one", how)
    with pytest.raises(NotServable, match="org/one"):
        start(settings, started)


def test_only_what_says_what_it_is_is_taken_from_its_config(
    hub: Hub, settings: Settings, started: list[TextEngine]
) -> None:
    right = expected(hub, "one").strip()
    change_config(
        hub.folder / "org" / "one",
        init_lora_weights="pissa",
        megatron_config={"a": 1},
        megatron_core="antigravity",
        auto_mapping={"base_model_class": "x", "parent_library": "antigravity"},
        unknown_key=1,
    )
    engine = start(settings, started)
    assert together(engine, "one") == [(right, "one")]
    assert "antigravity" not in sys.modules


def test_without_peft_the_start_names_the_extra(
    settings: Settings, started: list[TextEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelStoreError, match=r"runpod-modelstore\[adapters\]"):
        start(settings, started)


def test_another_model_of_the_worker_has_none(settings: Settings, started: list[TextEngine]) -> None:
    engine = start(replace(settings, adapters={}), started)
    with pytest.raises(JobError, match="org/name"):
        together(engine, "one")
