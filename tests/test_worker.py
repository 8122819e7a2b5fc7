"""The handler around an engine that misbehaves: every job is answered, and the worker lives on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from handler.jobs import Code, Completion, JobError, TextRequest
from handler.worker import answer, make_handler
from modelstore.timeline import Timeline

JOB = {"id": "1", "input": {"prompt": "hi"}}


class Engine:
    """Answers, or raises what it was given."""

    model = "org/name"

    def __init__(self, error: BaseException | None = None, *, takes_s: float = 0.0) -> None:
        self.error = error
        self.takes_s = takes_s
        self.freed = 0
        self.running = 0
        self.most_running = 0

    def generate(self, request: TextRequest) -> Completion:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        time.sleep(self.takes_s)
        self.running -= 1
        if self.error is not None:
            raise self.error
        return Completion(f"{request.prompt} there", 2)

    def swap(self, reference: str) -> Timeline:
        raise NotImplementedError

    def free_memory(self) -> None:
        self.freed += 1


def test_a_good_job_is_answered() -> None:
    assert answer(Engine(), JOB) == {
        "generated_text": "hi there",
        "tokens_generated": 2,
        "model": "org/name",
        "parameters": {"max_tokens": 100, "temperature": 0.7, "top_p": 0.9},
    }


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_answered_and_memory_is_freed(error: Exception) -> None:
    engine = Engine(error)
    output = answer(engine, JOB)
    assert output["code"] == "OOM"
    assert engine.freed == 1


def test_the_real_out_of_memory_error_of_torch_is_known() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert answer(Engine(caught.value), JOB)["code"] == "OOM"
    assert answer(Engine(torch.OutOfMemoryError("CUDA out of memory.")), JOB)["code"] == "OOM"


def test_any_other_failure_is_one_line_with_a_code() -> None:
    output = answer(Engine(ValueError("boom")), JOB)
    assert output == {"error": "ValueError: boom", "code": "INTERNAL_ERROR"}


def test_an_error_for_the_sender_goes_through_as_it_is() -> None:
    assert answer(Engine(JobError(Code.INVALID_INPUT, "too long")), JOB) == {
        "error": "too long",
        "code": "INVALID_INPUT",
    }


@pytest.mark.parametrize("job", [{}, {"id": 3}, {"input": 7}, {"input": {"prompt": ["x"]}}])
def test_nonsense_gets_an_error_and_no_exception(job: dict[str, Any]) -> None:
    assert answer(Engine(), job)["code"] == "INVALID_INPUT"


def test_the_event_loop_stays_free_and_generations_do_not_overlap() -> None:
    engine = Engine(takes_s=0.2)
    handler = make_handler(engine)

    async def run() -> tuple[list[dict[str, Any]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        outputs = await asyncio.gather(*(handler(JOB) for _ in range(3)))
        ticking.cancel()
        return outputs, ticks

    outputs, ticks = asyncio.run(run())
    assert [output["tokens_generated"] for output in outputs] == [2, 2, 2]
    assert ticks > 20
    assert engine.most_running == 1
