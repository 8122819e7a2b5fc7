"""Adapters beside the model: answers are peft's own, in one batch, and none is lost when an adapter is exchanged."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
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
from modelstore.volume import history, pins
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
    follower = AdapterFollower(engine, settings, "style", pytest.fail)
    follower.look()
    long = 40
    right = {name: (expected(hub, name, long).strip(), "style") for name in ("one", "two")}

    async def across_the_exchange() -> list[tuple[str, str]]:
        running = [asyncio.create_task(answer(engine, "style", long)) for _job in range(3)]
        while sum(row.tokens_left < long for row in engine._serving.batcher._running) < len(running):
            await asyncio.sleep(0.001)
        store.set_alias("style", "org/two", dtype="keep")
        exchange = asyncio.get_running_loop().run_in_executor(None, follower.look)
        during = [asyncio.create_task(answer(engine, "style", long)) for _job in range(3)]
        await exchange
        after = await answer(engine, "style", long)
        assert after == right["two"]
        assert await asyncio.gather(*running) == [right["one"]] * 3, "those that had begun"
        return await asyncio.gather(*during)

    for each in asyncio.run(across_the_exchange()):
        assert each in right.values()
    assert engine.adapter("style").repo_id == "org/two"
    (serving,) = [engine._serving.batcher]
    deadline = time.monotonic() + 60
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
    rewrite(hub.folder / "org" / "three", lambda tensors: tensors.update({A: torch.ones(4, 7)}))
    store.set_alias("style", "org/three", dtype="keep")
    AdapterFollower(engine, settings, "style", pytest.fail).look()
    assert together(engine, "style") == [(expected(hub, "one").strip(), "style")]
    (record,) = [each for each in history.starts(store.layout, limit=9) if each["kind"] == "swap"]
    assert "does not fit the model" in record["error"]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, Callable[[Path], None]] = {
    "another base": lambda folder: change_config(folder, base_model_name_or_path="org/other"),
    "DoRA": lambda folder: change_config(folder, use_dora=True),
    "layers of its own": lambda folder: change_config(folder, modules_to_save=["norm"]),
    "biases": lambda folder: change_config(folder, bias="all"),
    "weights beside a changed model": lambda folder: change_config(folder, init_lora_weights="pissa"),
    "an aLoRA": lambda folder: change_config(folder, alora_invocation_tokens=[1, 2]),
    "a rank too large": lambda folder: change_config(folder, rank_pattern={"q_proj": 1 << 20}),
    "a pattern that does not end": lambda folder: change_config(folder, alpha_pattern={"(a+)+$": 8}),
    "no factor": lambda folder: change_config(folder, lora_alpha="8"),
    "a missing matrix": lambda folder: rewrite(folder, lambda tensors: tensors.pop(A)),
    "another layer": lambda folder: rewrite(
        folder, lambda tensors: tensors.update({A.replace("q_proj", "no_proj"): tensors[A].clone()})
    ),
    "other sizes": lambda folder: rewrite(folder, lambda tensors: tensors.update({A: torch.ones(4, 7)})),
    "another rank on one side": lambda folder: rewrite(folder, lambda tensors: tensors.update({A: torch.ones(3, 32)})),
    "a weight of the model": lambda folder: rewrite(
        folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(12, 32)})
    ),
    "a layer under peft": lambda folder: rewrite(
        folder, lambda tensors: tensors.update({A.replace("lora_A", "base_layer"): torch.ones(32, 32)})
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_start_with_an_adapter_that_cannot_be_mixed_says_so(
    hub: Hub, store: ModelStore, settings: Settings, started: list[TextEngine], how: str
) -> None:
    BROKEN[how](hub.folder / "org" / "one")
    with pytest.raises(NotServable, match="org/one"):
        start(settings, started)
    (key,) = [key for key in store.catalog.keys() if key.repo_id == "org/one"]  # noqa: SIM118
    assert not pins.users(store.layout, key, pins.volume_time(store.layout)), "it is in use by nobody"


def test_ranks_and_factors_of_single_layers_are_pefts(hub: Hub, settings: Settings, started: list[TextEngine]) -> None:
    folder = hub.folder / "org" / "one"
    options = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 16}, "use_rslora": True}
    write_adapter(folder, hub.folder / "org" / "name", seed=9, **options)
    engine = start(settings, started)
    assert together(engine, "one", None) == [
        (expected(hub, "one").strip(), "one"),
        (expected(hub, None).strip(), "org/name"),
    ]


def test_only_what_says_what_it_is_is_taken_from_its_config(
    hub: Hub, settings: Settings, started: list[TextEngine]
) -> None:
    right = expected(hub, "one").strip()
    change_config(
        hub.folder / "org" / "one",
        target_modules="(a+)+$",
        megatron_config={"a": 1},
        megatron_core="antigravity",
        auto_mapping={"base_model_class": "x", "parent_library": "antigravity"},
        unknown_key=1,
    )
    engine = start(settings, started)
    assert together(engine, "one") == [(right, "one")]
    assert "antigravity" not in sys.modules


def test_a_call_that_fails_leaves_nothing_in_the_layers(settings: Settings, started: list[TextEngine]) -> None:
    engine = start(settings, started)
    before = together(engine, "one")
    adapters = engine._loaded.adapters
    assert adapters is not None
    for _time in range(3):
        with pytest.raises((RuntimeError, IndexError)):
            adapters.forward(torch.full((1, 4), 1 << 20), keys=["a0"])  # no ids of tokens
    assert adapters._layers
    assert not any(layer._forward_pre_hooks for layer in adapters._layers)
    assert together(engine, "one") == before


def test_the_operator_need_not_allow_what_it_names(hub: Hub, settings: Settings, started: list[TextEngine]) -> None:
    settings = replace(settings, allowed_models=(parse_reference("org/name"),))
    engine = start(settings, started)
    assert together(engine, "two") == [(expected(hub, "two").strip(), "two")]


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
