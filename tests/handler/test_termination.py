"""The end of a worker whose engine hangs, under the unmodified SDK."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from handler.engines.offload import ABANDONED_LIMIT
from tests.support.runpod_api import FINAL, RunPod

# A worker whose tokenizer never comes back, and whose engine cannot be closed.
WORKER = """
import sys, time
from pathlib import Path
from handler import termination
from handler.engines import offload
from handler.engines.offload import Offload
from handler.first_answer import FirstAnswer
from handler.worker import serve
from modelstore.settings import Settings
from tests.support.workers import Engine

termination.GRACE_S, termination._CLOSE_S, offload.STUCK_S = 3.0, 2.0, 0.5

class Hangs(Engine):
    def __init__(self):
        super().__init__()
        self.offload = Offload()
        self.broken = ""

    @property
    def broken(self):
        return self.offload.stuck

    @broken.setter
    def broken(self, _value): ...

    async def generate(self, request):
        if request.prompts[0].text == "hang":
            await self.offload.run(lambda: time.sleep(10_000), limit_s=10_000)
        async for piece in super().generate(request):
            yield piece

    def close(self):
        if sys.argv[1] == "close hangs":
            time.sleep(10_000)

settings = Settings(root=Path("/nowhere"), max_job_s=1.0, max_concurrency=2)
serve(Hangs(), settings, {}, FirstAnswer(None, 0.0))
"""


def started(runpod: RunPod, how: str) -> subprocess.Popen[bytes]:
    env = os.environ | runpod.worker_env("pod-1")
    command = [sys.executable, "-c", WORKER, how]
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close hangs", "closes"])
def test_a_worker_with_calls_that_hang_still_answers_and_ends_on_sigterm(how: str) -> None:
    with RunPod().running() as runpod:
        process = started(runpod, how)
        try:
            hung = [runpod.submit(f"hung-{number}", {"prompt": "hang"}) for number in range(ABANDONED_LIMIT - 1)]
            assert runpod.wait(lambda: all(job.status in FINAL for job in hung))
            assert {job.output["code"] for job in hung} == {"TIMEOUT"}
            job = runpod.submit("good", {"prompt": "hello"})
            assert runpod.wait(lambda: job.status in FINAL)
            assert job.status == "COMPLETED"
            assert not job.stops_pod
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the SDK's process that pings
            process.wait()


@pytest.mark.slow
def test_a_worker_with_too_many_calls_that_hang_asks_to_be_replaced_and_ends() -> None:
    with RunPod().running() as runpod:
        process = started(runpod, "close hangs")
        try:
            jobs = [runpod.submit(f"hung-{number}", {"prompt": "hang"}) for number in range(ABANDONED_LIMIT)]
            assert runpod.wait(lambda: all(job.status in FINAL for job in jobs))
            time.sleep(1)  # they have gone on for longer than it allows
            jobs.append(runpod.submit("hung-last", {"prompt": "hang"}))
            assert runpod.wait(lambda: all(job.status in FINAL for job in jobs))
            assert jobs[-1].stops_pod
            assert process.wait(20) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the SDK's process that pings
            process.wait()
