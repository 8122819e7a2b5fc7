"""Another model in the same process: the current one answers until the next is there, even if that fails."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from handler.answers import TextDelta
from handler.engines.text import TextEngine
from handler.jobs import Limits, parse_text
from modelstore import ModelStore
from modelstore.errors import DoesNotFit, ModelStoreError, Refused, RepoNotFound
from modelstore.load import blocks
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.pins import marks, users_of, volume_time
from modelstore.warmstart import begin
from tests.support.fake_cuda import FakeCuda
from tests.support.hub import Hub
from tests.support.models import write_model

REQUEST = parse_text({"prompt": "hello world", "max_tokens": 5, "temperature": 0}, Limits.of(Settings(root=Path("/"))))


class Gpu(str):
    """A device that torch takes for the CPU, and that says it is a GPU."""

    __slots__ = ()
    type, index = "cuda", 0

    def __str__(self) -> str:
        return "cuda:0"


Engines = Callable[[Settings], TextEngine]


@pytest.fixture
def settings(hub: Hub, store: ModelStore) -> Settings:
    for number, name in enumerate(("name", "other", "third")):
        write_model(hub.folder / "org" / name, seed=number)
    return replace(store.settings, model=parse_reference("org/name"))


@pytest.fixture
def engines() -> Iterator[list[TextEngine]]:
    made: list[TextEngine] = []
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def engine_for(engines: list[TextEngine]) -> Callable[[Settings], TextEngine]:
    def make(settings: Settings) -> TextEngine:
        engines.append(begin(settings).load(TextEngine.load))
        return engines[-1]

    return make


def generated(engine: TextEngine) -> str:
    """The whole answer to the request."""

    async def collect() -> list[TextDelta]:
        return [piece async for piece in engine.generate(REQUEST)]

    return "".join(piece.text for piece in asyncio.run(collect()))


def users(store: ModelStore, key: SnapshotKey) -> tuple[str, ...]:
    return users_of(marks(store.layout, key), volume_time(store.layout))


def answer_of(hub: Hub, name: str) -> str:
    """What transformers says by itself."""
    folder = hub.folder / "org" / name
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("hello world", return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=1)
    return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_next_model_answers_after_a_swap_and_its_start_is_a_record(
    engine_for: Engines, settings: Settings, hub: Hub
) -> None:
    engine = engine_for(settings)
    assert generated(engine) == answer_of(hub, "name")
    timeline = engine.swap("org/other")
    assert engine.model == "org/other"
    assert generated(engine) == answer_of(hub, "other")
    names = [span.name for span in timeline.spans]
    assert {"lookup", "read", "build", "ready"} <= set(names)
    assert timeline.spans[0].start < 1, "in seconds since the swap, not since the process began"
    assert (timeline.model, timeline.outcome) == ("org/other", "downloaded")
    assert engine.swap("org/other").spans[-1].name == "ready", "to what serves already: nothing to do"


def test_the_current_model_answers_while_the_next_is_read(
    engine_for: Engines, settings: Settings, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(settings)
    reading, go_on = threading.Event(), threading.Event()
    real = blocks.BlockReader._read

    def held(self: blocks.BlockReader, *what: Any) -> Any:
        reading.set()
        assert go_on.wait(20)
        return real(self, *what)

    monkeypatch.setattr(blocks.BlockReader, "_read", held)
    monkeypatch.setattr(
        "modelstore.load.reader_process.ReaderProcess.start", lambda _reading: None
    )  # threads, which can be held
    swap = threading.Thread(target=engine.swap, args=("org/other",))
    swap.start()
    assert reading.wait(20)
    for _ in range(3):
        assert generated(engine) == answer_of(hub, "name")
    assert engine.model == "org/name"
    go_on.set()
    swap.join(20)
    assert generated(engine) == answer_of(hub, "other")


def test_an_answer_that_is_being_made_ends_with_its_own_model_beside_those_of_the_next(
    engine_for: Engines, settings: Settings, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(settings)
    pending, go_on = threading.Event(), threading.Event()
    real = tf.LlamaForCausalLM.generate

    def slow(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not pending.is_set():
            pending.set()
            assert go_on.wait(20)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(tf.LlamaForCausalLM, "generate", slow)
    answers: list[str] = []
    job = threading.Thread(target=lambda: answers.append(generated(engine)))
    job.start()
    assert pending.wait(20)
    swap = threading.Thread(target=engine.swap, args=("org/other",))
    swap.start()
    until = time.monotonic() + 60
    while engine.model != "org/other":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert generated(engine) == answer_of(hub, "other"), "there is no pause"
    assert swap.is_alive(), "it waits for the answer"
    assert not answers
    go_on.set()
    job.join(20)
    swap.join(20)
    assert answers == [answer_of(hub, "name")]
    assert engine.model == "org/other"


@pytest.mark.parametrize("keep", [False, True])
def test_the_model_before_is_kept_if_that_was_asked_for(
    engine_for: Engines, settings: Settings, store: ModelStore, keep: bool
) -> None:
    engine = engine_for(replace(settings, keep_previous=keep))
    before = weakref.ref(engine._loaded.model)
    key = engine._loaded.key
    engine.swap("org/other")
    gc.collect()
    assert (before() is not None) == keep
    assert bool(users(store, key)) == keep, "what is kept is marked as in use"
    reads = engine.swap("org/name")
    assert ("read" in {span.name for span in reads.spans}) != keep
    assert (engine._loaded.model is before()) == keep
    assert generated(engine) is not None
    engine.swap("org/third")
    assert generated(engine) is not None
    del reads
    assert [engine._kept is not None, keep] in ([True, True], [False, False])


def test_a_swap_that_fails_leaves_the_current_model(
    engine_for: Engines, settings: Settings, hub: Hub, store: ModelStore
) -> None:
    engine = engine_for(replace(settings, allowed_models=(parse_reference("org/name"), parse_reference("org/gone"))))
    with pytest.raises(RepoNotFound):
        engine.swap("org/gone")
    with pytest.raises(Refused, match="MODELSTORE_ALLOWED_MODELS"):
        engine.swap("org/other")
    with pytest.raises(ModelStoreError):
        engine.swap("nonsense reference")
    assert generated(engine) == answer_of(hub, "name")


def test_a_swap_that_does_not_fit_puts_the_current_model_back(
    engine_for: Engines, settings: Settings, hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU without room for two models."""
    engine = engine_for(settings)
    moved: list[str] = []
    monkeypatch.setattr(engine, "_device", Gpu("cpu"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (0, 10**6))
    monkeypatch.setattr("modelstore.load.memory.free_gpu_bytes", lambda _visible: [0])
    monkeypatch.setattr(tf.LlamaForCausalLM, "to", lambda self, device: moved.append(str(device)) or self)
    monkeypatch.setattr("modelstore.load.torch_device._free_bytes", lambda device: -(10**9))
    with pytest.raises(DoesNotFit, match="without the model before"):
        engine.swap("org/other")
    assert moved == [], "nothing was moved"
    monkeypatch.setattr("modelstore.load.torch_device._free_bytes", lambda device: 10**9)

    def fails(self: Any, device: Any) -> Any:
        moved.append(str(device))
        if len(moved) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self

    monkeypatch.setattr(tf.LlamaForCausalLM, "to", fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.swap("org/other")
    assert len(moved) == 4, "the old one left, the new one failed, left, and the old one came back"
    assert engine.model == "org/name"
    assert generated(engine) == answer_of(hub, "name")
    other = store.lookup("org/other")
    assert other is not None
    assert not users(store, other.key)


def test_on_a_gpu_with_room_for_both_the_next_model_comes_beside_the_current_one(
    settings: Settings, hub: Hub, one_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = begin(settings).load(TextEngine.load)
    one = one_gpu.state.allocated
    assert one > 0
    monkeypatch.setattr(engine, "_device", Gpu("cpu"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (10**9, 10**9))
    for number in range(4):
        timeline = engine.swap("org/other" if number % 2 == 0 else "org/name")
        names = [span.name for span in timeline.spans]
        assert "transfer" in names
        assert "pause" not in names
        assert generated(engine) == answer_of(hub, "other" if number % 2 == 0 else "name")
        del timeline
        gc.collect()
        assert one_gpu.state.allocated == one
    assert one_gpu.state.peak == 2 * one
    engine.close()
    gc.collect()
    one_gpu.check_released()


def test_on_a_gpu_that_fills_up_meanwhile_the_next_model_waits_in_host_memory(
    settings: Settings, hub: Hub, one_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = begin(settings).load(TextEngine.load)
    monkeypatch.setattr(engine, "_device", Gpu("cpu"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (10**9, 10**9))
    monkeypatch.setattr("modelstore.load.torch_device._free_bytes", lambda _device: 10**9)
    monkeypatch.setenv("FAKE_CUDA_BYTES", str(one_gpu.state.allocated + 10_000))
    timeline = engine.swap("org/other")
    names = [span.name for span in timeline.spans]
    assert names.count("pause") == 1
    assert names.count("transfer") >= 2, "out of the GPU, and onto it"
    assert generated(engine) == answer_of(hub, "other")
    engine.close()
    del timeline
    gc.collect()
    one_gpu.check_released()


def test_a_model_before_that_cannot_be_kept_is_dropped(
    engine_for: Engines, settings: Settings, hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(replace(settings, keep_previous=True))
    before = engine._loaded.key

    def full(self: Any, device: Any) -> Any:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(tf.LlamaForCausalLM, "to", full)
    engine.swap("org/other")
    assert engine._kept is None
    assert users(store, before) == ()
    assert users(store, engine._loaded.key), "the one that serves stays marked"
    assert generated(engine) == answer_of(hub, "other")


def test_ten_swaps_leave_no_memory_and_no_thread_behind(
    engine_for: Engines, settings: Settings, tmp_path: Path
) -> None:
    engine = engine_for(settings)
    engine.swap("org/other")
    threads = threading.active_count()
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    for number in range(10):
        engine.swap("org/name" if number % 2 == 0 else "org/other")
    gc.collect()
    until = time.monotonic() + 60
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.05)  # the last reader may be about to end
    assert threading.active_count() <= threads
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= maps + 10
