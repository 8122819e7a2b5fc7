"""MultiModelEngine models in one worker, and an alias that is followed: no job is lost, none is answered by another model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.alias_follower import AliasFollower
from handler.answers import TextAnswer
from handler.engines.multi import MultiModelEngine
from handler.engines.text import TextEngine
from handler.errors import Code, JobError
from handler.jobs import Limits, parse_text
from modelstore import ModelStore
from modelstore.errors import DoesNotFit, Refused
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import history
from modelstore.warmstart import begin
from tests.support.hub import Hub
from tests.support.models import write_model

NAMES = ("org/name", "org/other", "org/third")


@pytest.fixture
def settings(hub: Hub, store: ModelStore) -> Settings:
    for number, name in enumerate(NAMES):
        write_model(hub.folder / name, seed=number)
        store.ensure(name)
    allowed = tuple(parse_reference(name) for name in NAMES)
    return replace(store.settings, model=parse_reference("org/name"), allowed_models=allowed)


class Made:
    """Loads engines, at most `room` beside the first, and keeps count."""

    def __init__(self) -> None:
        self.room = 9
        self.names: list[str] = []
        self.engines: list[TextEngine] = []

    def __call__(self, settings: Settings) -> TextEngine:
        if len([one for one in self.engines if hasattr(one, "_loaded")]) > self.room:
            raise DoesNotFit("it takes 3 GB and this machine has 2 GB free")
        self.names.append(str(settings.model))
        self.engines.append(begin(settings, timeline=Timeline()).load(TextEngine.load))
        return self.engines[-1]


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def engine(settings: Settings, made: Made) -> Iterator[MultiModelEngine]:
    several = MultiModelEngine(made(settings), settings, made)
    yield several
    several.close()


async def answered(engine: Any, model: str | None = None, **more: Any) -> dict[str, Any]:
    data = {"prompt": "hello world", "temperature": 0, "max_tokens": 5, "model": model} | more
    request = parse_text(data, Limits.of(Settings(root=Path("/"))))
    answer = TextAnswer(request)
    async for piece in engine.generate(request):
        answer.add(piece)
    return answer.output()


def test_a_job_gets_the_model_that_it_names(engine: MultiModelEngine, made: Made) -> None:
    outputs = [asyncio.run(answered(engine, name)) for name in (None, *NAMES, "org/other")]
    assert [output["model"] for output in outputs] == ["org/name", *NAMES, "org/other"]
    assert outputs[0]["generated_text"] == outputs[1]["generated_text"]
    assert made.names == list(NAMES), "each was loaded once"
    assert engine.status()["other_models"] == ["org/other", "org/third"]


def test_many_jobs_for_a_model_load_it_once(engine: MultiModelEngine, made: Made) -> None:
    async def run() -> list[dict[str, Any]]:
        return await asyncio.gather(*(answered(engine, name) for name in NAMES * 4))

    outputs = asyncio.run(run())
    assert [output["model"] for output in outputs] == list(NAMES * 4)
    assert sorted(made.names) == sorted(NAMES)


def test_the_least_recently_used_makes_room(engine: MultiModelEngine, made: Made) -> None:
    made.room = 1
    for name in ("org/other", "org/third", "org/third", None, "org/other"):
        assert asyncio.run(answered(engine, name))["model"] == (name or "org/name")
    assert made.names == ["org/name", "org/other", "org/third", "org/other"]
    assert len(engine.status()["other_models"]) == 1


def test_a_job_without_room_fails_and_the_worker_goes_on(engine: MultiModelEngine, made: Made) -> None:
    made.room = 0
    with pytest.raises(JobError, match="takes 3 GB") as caught:
        asyncio.run(answered(engine, "org/other"))
    assert caught.value.code is Code.MODEL_UNAVAILABLE
    assert asyncio.run(answered(engine))["model"] == "org/name"


def test_a_model_may_be_written_in_several_ways(engine: MultiModelEngine, made: Made) -> None:
    for name in ("hf://org/name", "org/other@main", "hf://org/other", "org/other"):
        assert asyncio.run(answered(engine, name))["model"] == name.removeprefix("hf://").partition("@")[0]
    assert made.names == ["org/name", "org/other"]


def test_a_model_that_was_exchanged_meanwhile_is_loaded_beside_the_new_one(
    engine: MultiModelEngine, made: Made
) -> None:
    own = engine._own.engine
    real = own.generate

    async def swapped_first(request: Any) -> Any:
        if own.model == "org/name":
            await asyncio.to_thread(own.swap, "org/third")
        async for piece in real(request):
            yield piece

    own.generate = swapped_first  # type: ignore[method-assign]
    assert asyncio.run(answered(engine, "org/name"))["model"] == "org/name"
    assert engine.model == "org/third"


def test_a_job_that_is_cancelled_while_its_model_is_loaded_does_not_keep_it(
    engine: MultiModelEngine, made: Made
) -> None:
    made.room = 1

    async def run() -> None:
        task = asyncio.create_task(answered(engine, "org/other"))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await answered(engine, "org/third"))["model"] == "org/third", "org/other made room for it"

    asyncio.run(run())
    assert made.names == list(NAMES)


@pytest.mark.parametrize("name", ["org/unlisted", "gpt-4", "what is this", "../x"])
def test_models_that_may_not_be_asked_for(engine: MultiModelEngine, name: str) -> None:
    with pytest.raises(JobError, match="this worker serves org/name, org/other, org/third, not") as caught:
        asyncio.run(answered(engine, name))
    assert caught.value.code is Code.MODEL_NOT_ALLOWED


def test_more_jobs_than_threads_wait_for_models_without_holding_up_the_others(
    engine: MultiModelEngine, made: Made
) -> None:
    made.room = 1

    async def run() -> list[dict[str, Any]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        names = ["org/other", "org/third", None] * 6
        return await asyncio.wait_for(asyncio.gather(*(answered(engine, name) for name in names)), 60)

    assert [output["model"] for output in asyncio.run(run())] == ["org/other", "org/third", "org/name"] * 6


def test_a_follower_outlives_every_record(
    chat: TextEngine, settings: Settings, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.alias_follower.LOOK_EVERY_S", 0.02)
    follower = AliasFollower(chat, replace(settings, model=parse_reference("@chat")), pytest.fail)
    store.layout.alias("chat").write_text(
        '{"history": [{"repo_id": 7, "commit": [], "dtype": {}, "at": "x", "by": 1}]}'
    )
    follower.start()
    time.sleep(0.2)
    store.set_alias("chat", "org/other")
    until = time.monotonic() + 60
    while chat.model != "org/other" and time.monotonic() < until:
        time.sleep(0.02)
    follower.stop()
    assert chat.model == "org/other"


def test_without_a_list_only_the_own_model_is_served(settings: Settings, made: Made) -> None:
    engine = MultiModelEngine(made(settings), replace(settings, allowed_models=()), made)
    with pytest.raises(JobError, match="this worker serves org/name, not 'org/other'"):
        asyncio.run(answered(engine, "org/other"))
    engine.close()


@pytest.fixture
def chat(settings: Settings, store: ModelStore) -> Iterator[TextEngine]:
    store.set_alias("chat", "org/name")
    engine = begin(replace(settings, model=parse_reference("@chat"), allowed_models=())).load(TextEngine.load)
    yield engine
    engine.close()


@pytest.mark.slow
def test_an_alias_that_is_repointed_under_load_loses_no_job(
    chat: TextEngine, settings: Settings, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.alias_follower.LOOK_EVERY_S", 0.02)
    follower = AliasFollower(chat, replace(settings, model=parse_reference("@chat")), pytest.fail)
    follower.start()
    seen: list[tuple[str, str]] = []

    async def load_on_it() -> None:
        async def one() -> None:
            while len({model for model, _text in seen}) < 2 or swaps.is_alive():
                output = await answered(chat, "@chat", max_tokens=20)
                seen.append((output["model"], output["generated_text"]))

        await asyncio.gather(*(one() for _ in range(4)))

    def repoint() -> None:
        for number in range(10):
            store.set_alias("chat", NAMES[(number + 1) % 2])
            until = time.monotonic() + 60
            while chat.model != NAMES[(number + 1) % 2] and time.monotonic() < until:
                time.sleep(0.01)

    swaps = threading.Thread(target=repoint)
    swaps.start()
    asyncio.run(load_on_it())
    swaps.join()
    follower.stop()
    assert chat.model == "org/name"
    assert len(seen) > 10
    texts = {model: {text for name, text in seen if name == model} for model, _ in seen}
    assert set(texts) == {"org/name", "org/other"}
    assert all(len(found) == 1 for found in texts.values()), "none was answered by the other model"


def test_a_worker_that_cannot_exchange_models_is_to_be_replaced(
    chat: TextEngine, settings: Settings, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    follower = AliasFollower(chat, replace(settings, model=parse_reference("@chat")), reasons.append)
    follower.look()
    assert not reasons
    store.set_alias("chat", "org/other")

    def refuses(reference: str) -> Timeline:
        raise Refused("it lies on several GPUs")

    monkeypatch.setattr(chat, "swap", refuses)
    follower.look()
    assert reasons == ["it lies on several GPUs"]


def test_a_swap_that_fails_is_not_tried_all_the_time(
    chat: TextEngine, settings: Settings, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fails(reference: str) -> Timeline:
        tried.append(reference)
        raise DoesNotFit("too large")

    monkeypatch.setattr(chat, "swap", fails)
    follower = AliasFollower(chat, replace(settings, model=parse_reference("@chat")), pytest.fail)
    store.set_alias("chat", "org/other")
    for _ in range(3):
        follower.look()
    assert tried == ["@chat"]
    assert asyncio.run(answered(chat))["model"] == "org/name"
    (record,) = history.starts(store.layout, limit=9)
    assert (record["kind"], record["model"], record["error"]) == ("swap", "@chat", "DoesNotFit: too large")


def test_a_swap_leaves_a_record(chat: TextEngine, settings: Settings, store: ModelStore) -> None:
    follower = AliasFollower(chat, replace(settings, model=parse_reference("@chat")), pytest.fail)
    follower.look()
    assert history.starts(store.layout, limit=9) == []
    snapshot = store.set_alias("chat", "org/other")
    follower.look()
    (record,) = history.starts(store.layout, limit=9)
    assert (record["kind"], record["model"], record["outcome"], record["error"]) == ("swap", "@chat", "hit", "")
    assert (record["commit"], record["worker"]) == (snapshot.commit, settings.worker_id)
    assert abs(record["at"] - time.time()) < 60


@pytest.mark.parametrize("listed", ["org/other@COMMIT", "org/other"])
@pytest.mark.parametrize("asked", ["org/other@LATER", "org/other@refs/pr/1", "org/other@v9"])
def test_a_job_cannot_bring_another_revision_of_an_allowed_model(
    hub: Hub, settings: Settings, store: ModelStore, made: Made, listed: str, asked: str
) -> None:
    commit = hub.commit(hub.folder / "org/other")
    write_model(hub.folder / "org/other", seed=77)
    later = hub.commit(hub.folder / "org/other")
    hub.served.requests.clear()
    allowed = (parse_reference("org/name"), parse_reference(listed.replace("COMMIT", commit)))
    engine = MultiModelEngine(made(settings), replace(settings, allowed_models=allowed), made)
    published = sorted(store.layout.models.glob("*/*"))
    with pytest.raises(JobError) as caught:
        asyncio.run(answered(engine, asked.replace("LATER", later)))
    engine.close()
    assert caught.value.code is Code.MODEL_NOT_ALLOWED
    assert sorted(store.layout.models.glob("*/*")) == published
    assert hub.served.requests == [], "nothing was asked of the Hub"


def test_the_bare_name_is_the_own_revision_and_main_is_another(
    settings: Settings, store: ModelStore, made: Made
) -> None:
    commit = next(key.commit for key in store.catalog.keys("org/name"))
    own = parse_reference(f"org/name@{commit}")
    pinned = replace(settings, model=own, allowed_models=(own,))
    engine = MultiModelEngine(made(pinned), pinned, made)
    assert asyncio.run(answered(engine, "org/name"))["model"] == "org/name"
    assert asyncio.run(answered(engine, f"org/name@{commit}"))["model"] == "org/name"
    with pytest.raises(JobError, match="this worker serves"):
        asyncio.run(answered(engine, "org/name@main"))
    engine.close()


def test_names_that_jobs_give_are_not_kept(engine: MultiModelEngine) -> None:
    for number in range(50):
        with pytest.raises(JobError):
            asyncio.run(answered(engine, f"org/other@v{number}"))
    asyncio.run(answered(engine, "org/other"))
    assert engine._loads == {}
    assert list(engine._others) == ["org/other"]
