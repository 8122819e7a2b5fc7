"""The handler around an engine that misbehaves: every job is answered, and the worker lives on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from handler.answers import TextDelta
from handler.delivery import JobChannel
from handler.errors import Code, JobError
from handler.first_answer import FirstAnswer
from handler.worker import Worker
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import history
from modelstore.volume.layout import Layout
from tests.support.workers import Engine, RecordedChannel

JOB = {"id": "1", "input": {"prompt": "hi"}}


def worker(engine: Engine, channel: JobChannel | None = None, **settings: Any) -> Worker:
    return Worker(engine, Settings(root=Path("/nowhere"), **settings), channel=channel, timeline={"outcome": "hit"})


def answer(engine: Engine, job: Mapping[str, Any] = JOB, channel: JobChannel | None = None, **settings: Any) -> Any:
    return asyncio.run(worker(engine, channel, **settings).handle(job))


def test_a_good_job_is_answered() -> None:
    assert answer(Engine()) == {
        "generated_text": "hi there",
        "tokens_generated": 2,
        "finish_reason": "stop",
        "model": "org/name",
        "parameters": {"max_tokens": 100, "temperature": 0.7, "top_p": 0.9},
    }


def test_prompts_are_answered_as_lists_in_their_order() -> None:
    engine = Engine(TextDelta(1, "b", 1, "length", 1), TextDelta(0, "a", 2, "stop", 1))
    output = answer(engine, {"id": "1", "input": {"prompts": ["x", "y"]}})
    assert output["generated_text"] == ["a", "b"]
    assert output["tokens_generated"] == [2, 1]
    assert output["finish_reason"] == ["stop", "length"]


def test_a_stream_is_sent_as_it_comes_and_is_the_output_too() -> None:
    told = RecordedChannel()
    output = answer(Engine(takes_s=0.02), {"id": "1", "input": {"prompt": "hi", "stream": True}}, told)
    assert told.chunks == output
    assert [chunk["token"] for chunk in output] == ["hi", " there", ""]
    assert [chunk["finished"] for chunk in output] == [False, False, True]
    assert output[-1]["generated_text"] == "hi there"
    assert output[-1]["tokens_generated"] == 2


def test_chunks_that_come_while_one_is_sent_go_out_together() -> None:
    told = RecordedChannel(takes_s=0.1)
    pieces = [*(TextDelta(0, f"{number} ", 1) for number in range(50)), TextDelta(0, "end", 1, "stop")]
    output = answer(Engine(*pieces, takes_s=0.005), {"id": "1", "input": {"prompt": "hi", "stream": True}}, told)
    assert told.chunks == output
    assert len(output) < 15
    assert "".join(chunk["token"] for chunk in output) == output[-1]["generated_text"]


def test_streams_of_several_prompts_say_whose_each_chunk_is() -> None:
    engine = Engine(
        TextDelta(0, "a", 1), TextDelta(1, "b", 1), TextDelta(1, "c", 1, "stop"), TextDelta(0, "d", 1, "stop")
    )
    told = RecordedChannel(takes_s=0.05)
    output = answer(engine, {"id": "1", "input": {"prompts": ["x", "y"], "stream": True}}, told)
    texts = ["".join(chunk["token"] for chunk in output if chunk["index"] == index) for index in (0, 1)]
    assert texts == ["ad", "bc"]
    assert [chunk["generated_text"] for chunk in output if chunk["finished"]] == ["bc", "ad"]


def test_a_long_job_says_how_far_it_is_and_never_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.delivery.PROGRESS_EVERY_S", 0.25)
    told = RecordedChannel()
    pieces = [*(TextDelta(0, "", 32) for _ in range(10)), TextDelta(0, "x", 1, "stop")]
    output = answer(Engine(*pieces, takes_s=0.1), JOB, told)
    assert output["tokens_generated"] == 321
    assert 2 <= len(told.updates) <= 5
    assert all(0 < update["tokens_generated"] < 321 for update in told.updates)
    told = RecordedChannel()
    assert answer(Engine(takes_s=0.01), JOB, told)
    assert told.updates == [], "a short job has nothing to say"
    assert answer(Engine(TextDelta(0, "late", 9, "stop"), takes_s=0.5), JOB, told)
    assert told.updates == [], "nor has one whose result is next"


def test_a_job_that_takes_too_long_ends_with_an_error() -> None:
    engine = Engine(takes_s=60)
    began = time.monotonic()
    output = answer(engine, max_job_s=0.1)
    assert output["code"] == "TIMEOUT"
    assert "MODELSTORE_MAX_JOB_S" in output["error"]
    assert time.monotonic() - began < 10
    assert engine.left == ["early"]


def test_a_cancelled_job_ends_the_generation() -> None:
    engine = Engine(takes_s=5)
    one = worker(engine)

    async def run() -> None:
        task = asyncio.create_task(one.handle(JOB))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert engine.left == ["early"]
    assert one.status()["jobs"] == {"running": 0, "completed": 0, "failed": 0, "cancelled": 1}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_answered(error: Exception) -> None:
    assert answer(Engine(error=error))["code"] == "OOM"


def test_the_real_out_of_memory_error_of_torch_is_known() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert answer(Engine(error=caught.value))["code"] == "OOM"
    assert answer(Engine(error=torch.OutOfMemoryError("CUDA out of memory.")))["code"] == "OOM"


def test_any_other_failure_is_one_line_with_a_code() -> None:
    assert answer(Engine(error=ValueError("boom"))) == {
        "error": "INTERNAL_ERROR: ValueError: boom",
        "code": "INTERNAL_ERROR",
    }


def test_a_stream_that_fails_has_its_code_and_sent_chunks_stay() -> None:
    told = RecordedChannel()
    engine = Engine(TextDelta(0, "hi", 1), error=JobError(Code.OOM, "too much"))
    assert answer(engine, {"id": "1", "input": {"prompt": "hi", "stream": True}}, told) == {
        "error": "OOM: too much",
        "code": "OOM",
    }
    assert [chunk.get("error") for chunk in told.chunks] == [None, "OOM: too much"], "the stream ends with it"


def test_an_error_for_the_sender_goes_through_as_it_is() -> None:
    output = answer(Engine(error=JobError(Code.INVALID_INPUT, "too long")))
    assert output == {"error": "INVALID_INPUT: too long", "code": "INVALID_INPUT"}


def test_a_worker_whose_gpu_is_lost_is_replaced_when_its_last_job_is_answered() -> None:
    engine = Engine(takes_s=0.05)
    one = worker(engine)
    assert one.concurrency(1) == 16

    async def run() -> None:
        first, second = (
            asyncio.create_task(one.handle(job)) for job in (JOB, JOB | {"input": {"prompt": "x", "stream": True}})
        )
        await asyncio.sleep(0.02)
        engine.broken = "the GPU does not answer any more"
        assert one.concurrency(16) == 1, "it takes no more"
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        if not (first.done() and second.done()):
            assert not one.is_finished, "the other one still runs"
        await asyncio.gather(first, second)
        assert one.is_finished

    asyncio.run(run())


def test_a_worker_that_is_to_be_replaced_says_so_with_its_next_answer() -> None:
    one = worker(Engine())
    one.replace("several GPUs")
    assert asyncio.run(one.handle(JOB))["generated_text"] == "hi there"
    assert one.is_finished


@pytest.mark.parametrize(
    "job", [{}, {"id": 3}, {"input": 7}, {"input": {"prompt": [["x"]]}}, {"input": {"op": "dance"}}]
)
def test_nonsense_gets_an_error_and_no_exception(job: dict[str, Any]) -> None:
    assert answer(Engine(), job)["code"] == "INVALID_INPUT"


def test_status_tells_the_model_and_the_jobs() -> None:
    one = worker(Engine(), worker_id="pod-7")

    async def run() -> Any:
        await one.handle(JOB)
        await one.handle({"id": "2", "input": {}})
        return await one.handle({"id": "3", "input": {"op": "status"}})

    status = asyncio.run(run())
    assert status["model"] == "org/name"
    assert status["worker"] == "pod-7"
    assert status["jobs"] == {"running": 1, "completed": 1, "failed": 1, "cancelled": 0}
    assert status["timeline"] == {"outcome": "hit"}
    assert status["uptime_s"] >= 0


def openai_job(route: str, **body: Any) -> dict[str, Any]:
    return {"id": "7", "input": {"openai_route": route, "openai_input": body or None}}


def test_an_openai_route_is_answered_in_its_form() -> None:
    output = answer(Engine(), openai_job("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]))
    assert output["object"] == "chat.completion"
    assert output["choices"][0]["message"] == {"role": "assistant", "content": "hi there"}
    assert output["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert answer(Engine(), openai_job("/v1/models"))["data"][0]["id"] == "org/name"


def test_an_openai_stream_is_server_sent_events() -> None:
    told = RecordedChannel()
    job = openai_job("/v1/completions", prompt="hi", stream=True, stream_options={"include_usage": True})
    output = answer(Engine(), job, told)
    assert "".join(told.chunks) == "".join(output)
    assert "".join(output).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("job", "status", "code"),
    [
        (openai_job("/v1/embeddings"), 400, "INVALID_INPUT"),
        (openai_job("/v1/completions"), 400, "INVALID_INPUT"),
        (openai_job("/v1/completions", prompt="x", model="gpt-4"), 404, "model_not_found"),
        (
            openai_job("/v1/chat/completions", messages=[{"role": "user", "content": ""}], model="org/other"),
            404,
            "model_not_found",
        ),
    ],
)
def test_an_openai_error_has_openais_form_as_a_text(job: dict[str, Any], status: int, code: str) -> None:
    error = json.loads(answer(Engine(), job)["error"])
    assert error["type"] == "invalid_request_error"
    assert (error["status"], error["code"]) == (status, code)
    assert "org/name" in error["message"] or status == 400, "it names what is served"


def test_the_own_model_may_have_further_names() -> None:
    for name in ("gpt-4", "chat"):
        job = openai_job("/v1/completions", prompt="x", model=name)
        assert answer(Engine(), job, served_names=("gpt-4", "chat"))["choices"][0]["text"] == "hi there"
        assert answer(Engine(), {"id": "1", "input": {"prompt": "x", "model": name}}, served_names=("gpt-4", "chat"))[
            "model"
        ]
    listed = answer(Engine(), openai_job("/v1/models"), served_names=("gpt-4",))["data"]
    assert [each["id"] for each in listed] == ["org/name", "gpt-4"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "make", [lambda **body: {"id": "1", "input": body}, lambda **body: openai_job("/v1/completions", **body)]
)
def test_a_result_that_runpod_does_not_take_is_an_error(make: Any, stream: bool) -> None:
    told = RecordedChannel()
    engine = Engine(TextDelta(0, "a", 1), TextDelta(0, "x" * 2000, 1), TextDelta(0, "", 1, "stop"), takes_s=0.01)
    output = answer(engine, make(prompt="x", stream=stream), told, max_result_bytes=1500)
    assert output["code"] == "RESULT_TOO_LARGE"
    assert "MODELSTORE_MAX_RESULT" in output["error"]
    assert all(len(json.dumps(chunk)) < 1500 for chunk in told.chunks)
    if stream:
        assert "RESULT_TOO_LARGE" in json.dumps(told.chunks[-2:]), "the stream ends with it"
        assert json.dumps(told.chunks).count("[DONE]") <= 1


@pytest.mark.parametrize(
    "data", [{"op": "status", "prompt": "x"}, {"openai_route": "/v1/models", "openai_input": {"x": 1}}]
)
def test_a_request_without_fields_takes_none(data: dict[str, Any]) -> None:
    assert answer(Engine(), {"id": "1", "input": data})["code"] == "INVALID_INPUT"


def test_a_stream_whose_chunks_are_too_large_together_ends_once() -> None:
    told = RecordedChannel()
    pieces = [*(TextDelta(0, "x" * 200, 1) for _ in range(9)), TextDelta(0, "", 1, "stop")]
    output = answer(
        Engine(*pieces, takes_s=0.01),
        openai_job("/v1/completions", prompt="x", stream=True),
        told,
        max_result_bytes=2500,
    )
    assert output["code"] == "RESULT_TOO_LARGE"
    assert "".join(told.chunks).count("[DONE]") == 1


def test_a_stream_of_openais_that_fails_ends_with_an_error_event() -> None:
    told = RecordedChannel()
    output = answer(Engine(takes_s=0.2), openai_job("/v1/completions", prompt="x", stream=True), told, max_job_s=0.3)
    assert output["code"] == "TIMEOUT"
    events = "".join(told.chunks).split("\n\n")
    assert json.loads(events[-3][6:])["error"]["code"] == "TIMEOUT"
    assert events[-2:] == ["data: [DONE]", ""]


class PanicException(BaseException):
    """As a library in Rust raises it (pyo3_runtime.PanicException): no Exception."""


@pytest.mark.parametrize(
    "error", [PanicException("index out of bounds"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()]
)
@pytest.mark.parametrize(
    "job", [JOB, {"id": "1", "input": {"openai_route": "/v1/completions", "openai_input": {"prompt": "x"}}}]
)
def test_a_job_is_answered_for_every_error_inside_it(error: BaseException, job: Mapping[str, Any]) -> None:
    output = answer(Engine(error=error), job)
    assert output["code"] == "INTERNAL_ERROR"
    assert isinstance(output["error"], str), "RunPod takes no object as a job's error"


def test_a_job_that_is_cancelled_from_outside_is_not_answered() -> None:
    async def run() -> None:
        task = asyncio.create_task(worker(Engine(takes_s=5)).handle(JOB))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


HUGE = "x" * 11_000_000


@pytest.mark.parametrize(
    "data",
    [
        {"messages": [{"role": HUGE, "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi", "name": HUGE}]},
        {"messages": [{"role": "user", "content": "hi"}] * 500_000},
        {"messages": [{"role": "user", "content": "a"}] * 5_000},
        {"prompts": ["x" * 900_000] * 32},
        {"prompt": "hi", "model": HUGE},
        {"prompt": "hi", "op": HUGE},
        {"prompt": "hi", HUGE: 1},
        {"prompt": "hi", "more": [[[{"deep": HUGE}]]]},
        {"prompt": "hi", "more": [0] * 5_000_000},
        {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [{"role": HUGE, "content": "hi"}]}},
        {"openai_route": HUGE, "openai_input": {"prompt": "hi"}},
    ],
)
def test_limits_count_all_that_a_request_carries(data: dict[str, Any]) -> None:
    engine = Engine()
    began = time.monotonic()
    output = answer(engine, {"id": "1", "input": data})
    assert time.monotonic() - began < 2
    assert "at most" in output["error"]
    assert len(output["error"]) < 400
    assert engine.left == [], "the engine never saw it"


def test_an_error_quotes_a_value_on_one_line_cut_and_printable() -> None:
    model = "org/x\n\x1b[2J\u202estart failed: " + "y" * 2_000
    output = answer(Engine(), {"id": "1", "input": {"prompt": "hi", "model": model}})
    assert output["code"] == "MODEL_NOT_ALLOWED"
    assert output["error"].isprintable()
    assert len(output["error"]) < 300


def test_no_answer_shows_the_path_of_the_volume() -> None:
    error = RuntimeError("cannot read /nowhere/store/models/org--name/x.safetensors: Input/output error")
    settings = {"root": Path("/nowhere/store")}
    made = Worker(Engine(error=error), Settings(**settings), timeline={"model": "file:///nowhere/store/mine"})
    told = asyncio.run(made.handle(JOB))
    assert "cannot read <volume>: Input/output error" in told["error"]
    status = asyncio.run(made.handle({"id": "2", "input": {"op": "status"}}))
    assert "/nowhere" not in str(status)


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "hi \ud83d"},
        {"prompts": ["a", "b \udc00"]},
        {"messages": [{"role": "\ud83d", "content": "hi"}]},
        {"prompt": "hi", "stop": ["\ud83d"]},
        {"prompt": "hi", "model": "org/\ud83d"},
        {"prompt": "hi", "\ud83d": 1},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "hi \ud83d"}},
    ],
)
def test_half_a_character_is_the_senders_fault(data: dict[str, Any]) -> None:
    output = answer(Engine(), {"id": "1", "input": data})
    assert output["code"] == "INVALID_INPUT"
    assert "half a character" in output["error"]


def test_the_first_answer_is_added_to_the_record_of_the_start(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    began = time.monotonic() - 5
    path = history.add(layout, Timeline(worker="w1", model="org/name", began=began))
    first = FirstAnswer(path, began)
    engine = Engine()
    answering = Worker(engine, Settings(root=tmp_path), first_answer=first)

    async def jobs() -> None:
        await answering.handle({"id": "0", "input": {"prompt": 7}})  # refused, which is no answer
        await answering.handle({**JOB, "delayTime": 12_500})
        await answering.handle({**JOB, "delayTime": 1})

    asyncio.run(jobs())
    deadline = time.monotonic() + 30
    while "first_job" not in (record := history.starts(layout, limit=1)[0]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 5 <= record["first_job"]["taken"] <= record["first_job"]["first_token"] < 60
    assert record["first_job"]["queued_s"] == 12.5
