"""The unmodified SDK on both sides: `python -m handler` as the worker, `runpod.Endpoint` and `openai` as clients, and the
stand-in of RunPod between them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import running_hub
from tests.support.models import write_model
from tests.support.runpod_api import ENDPOINT, FINAL, KEY, RunPod
from tests.support.workers import serving, serving_http

HERE = Path(__file__).parent.parent.parent
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def worker_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a worker that serves a tiny model."""
    folder = tmp_path_factory.mktemp("runpod")
    with running_hub(folder / "hub") as hub:
        write_model(hub.folder / "org" / "name", seed=1, context=512, ends=False)
        root = str(folder / "volume" / "modelstore")
        yield {"HF_ENDPOINT": hub.url, "MODELSTORE_ROOT": root, "HF_HOME": str(folder), "MODEL_ID": "org/name"}


@pytest.fixture(scope="module")
def runpod(worker_env: dict[str, str]) -> Iterator[RunPod]:
    """A stand-in with one worker."""
    with RunPod().running() as runpod, serving(worker_env | runpod.env):
        yield runpod


@pytest.fixture(scope="module")
def worker_url(worker_env: dict[str, str]) -> Iterator[str]:
    """A worker by itself."""
    with serving_http(worker_env) as url:
        yield url


def test_run_sync_answers(endpoint: Any) -> None:
    output = endpoint.run_sync({"prompt": "hello world"} | GREEDY, timeout=240)
    assert output["model"] == "org/name"
    assert output["parameters"] == {"max_tokens": 6, "temperature": 0.0, "top_p": 0.9}


def test_a_job_is_polled_to_its_end(endpoint: Any) -> None:
    job = endpoint.run({"input": {"prompt": "hello world"} | GREEDY})
    output = job.output(timeout=240)
    assert job.status() == "COMPLETED"
    assert output == endpoint.run_sync({"prompt": "hello world"} | GREEDY)


def test_a_stream_has_the_same_text_and_comes_in_chunks(endpoint: Any, runpod: RunPod) -> None:
    whole = endpoint.run_sync({"prompt": "hello world"} | GREEDY)
    job = endpoint.run({"input": {"prompt": "hello world", "stream": True} | GREEDY})
    chunks = list(job.stream())
    assert "".join(chunk["token"] for chunk in chunks) == whole["generated_text"]
    assert chunks[-1]["finished"]
    assert chunks[-1]["generated_text"] == whole["generated_text"]
    assert job.output() == chunks, "the aggregated stream is the output"
    assert not runpod.jobs[job.job_id].after_the_end


def test_prompts_are_one_batch(endpoint: Any) -> None:
    prompts = ["hello world", "what is the capital", "paris"]
    together = endpoint.run_sync({"prompts": prompts} | GREEDY)
    one_by_one = [endpoint.run_sync({"prompt": prompt} | GREEDY) for prompt in prompts]
    assert together["generated_text"] == [output["generated_text"] for output in one_by_one]
    assert together["tokens_generated"] == [output["tokens_generated"] for output in one_by_one]


def test_an_error_has_its_code(endpoint: Any, runpod: RunPod) -> None:
    for job_input in ({"prompt": 7}, {"prompt": 7, "stream": True}):
        job = endpoint.run({"input": job_input})
        job.output(timeout=240)
        assert job.status() == "FAILED"
        assert runpod.jobs[job.job_id].output == {"code": "INVALID_INPUT"}
        assert "prompt must be a string" in runpod.jobs[job.job_id].error


def test_jobs_run_beside_each_other_and_a_cancelled_one_ends(endpoint: Any, runpod: RunPod) -> None:
    long = endpoint.run({"input": {"prompt": "hello", "max_tokens": 480, "temperature": 2, "top_p": 1, "stream": True}})
    record = runpod.jobs[long.job_id]
    assert runpod.wait(lambda: record.stream)
    short = runpod.submit("short", {"prompt": "hello world"} | GREEDY)  # the SDK's client would look a second later
    assert runpod.wait(lambda: short.status == "COMPLETED")
    assert record.status == "IN_PROGRESS"
    long.cancel()
    assert record.status == "CANCELLED"
    deadline = time.monotonic() + 60
    while endpoint.run_sync({"op": "status"})["jobs"]["running"] > 1:  # the status job itself is one
        assert time.monotonic() < deadline, "it goes on"
    said = len(record.after_the_end)
    time.sleep(0.5)
    assert len(record.after_the_end) == said, "nothing more is sent"


def test_status_and_health(endpoint: Any) -> None:
    status = endpoint.run_sync({"op": "status"})
    assert status["model"] == "org/name"
    assert status["worker"] == "pod-1"
    assert len(status["commit"]) == 40
    assert status["timeline"]["outcome"] == "downloaded"
    assert {span["name"] for span in status["timeline"]["spans"]} >= {"download", "read", "ready"}
    health = endpoint.health()
    assert health["jobs"]["completed"] >= 1


def test_the_openai_client_chats(client: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="org/name", messages=messages, temperature=0, max_tokens=6)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="org/name",
        messages=messages,
        temperature=0,
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_openai_client_completes_and_lists_models(client: Any) -> None:
    whole = client.completions.create(model="org/name", prompt=["hello world", "paris"], temperature=0, max_tokens=4)
    assert [choice.index for choice in whole.choices] == [0, 1]
    parts = client.completions.create(model="org/name", prompt="paris", temperature=0, max_tokens=4, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[1].text
    assert [model.id for model in client.models.list()] == ["org/name"]


def test_the_openai_client_gets_errors_as_its_own(client: Any) -> None:
    import openai

    ask = {"model": "org/name", "messages": [{"role": "user", "content": "hello"}]}
    for more, kind, words in (
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format is not served"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens must be"),
        ({"extra_body": {"whatever": 1}}, openai.BadRequestError, "whatever is not served"),
        ({"model": "gpt-4"}, openai.NotFoundError, "this worker serves org/name, not 'gpt-4'"),
    ):
        for stream in (False, True):
            with pytest.raises(kind, match=words) as caught:
                client.chat.completions.create(**(ask | more), stream=stream)
            code = "model_not_found" if kind is openai.NotFoundError else "INVALID_INPUT"
            assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")


def test_a_start_that_fails_tells_the_waiting_jobs_once(store_env: dict[str, str], tmp_path: Path) -> None:
    with RunPod().running() as runpod:
        native = runpod.submit("native", {"prompt": "hi"})
        other = runpod.submit("openai", {"openai_route": "/v1/completions", "openai_input": {"prompt": "hi"}})
        env = os.environ | store_env | runpod.env | {"MODEL_ID": "org/missing"}
        command = [sys.executable, "-m", "handler"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 3
        assert done.stderr.splitlines()[-1].startswith("start failed: RepoNotFound")
        assert (native.status, native.output) == ("FAILED", {"code": "MODEL_UNAVAILABLE"})
        assert "the worker's start failed: RepoNotFound: " in native.error
        assert json.loads(other.error)["status"] == 503
        assert len(native.answers) == len(other.answers) == 1
        bad = subprocess.run(
            command, env=env | {"MODELSTORE_LEASE_S": "x"}, capture_output=True, text=True, timeout=240, check=False
        )
        assert bad.returncode == 2, "without a waiting job it ends at once"


def test_a_hundred_jobs_at_once_are_all_answered(endpoint: Any) -> None:
    with ThreadPoolExecutor(20) as pool:
        outputs = list(
            pool.map(lambda _: endpoint.run_sync({"prompt": "hello world"} | GREEDY, timeout=120), range(100))
        )
    assert len(outputs) == 100
    assert len({output["generated_text"] for output in outputs}) == 1


def environment(runpod: RunPod) -> dict[str, str]:
    return (
        os.environ
        | runpod.client_env
        | {"ENDPOINT_ID": ENDPOINT, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    )


BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (HERE / "docs" / "client.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_of_the_clients_page_works(language: str, block: str, runpod: RunPod, worker_url: str) -> None:
    command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
    done = subprocess.run(
        command,
        cwd=HERE,
        env=environment(runpod) | {"WORKER_URL": worker_url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


def invoke(runpod: RunPod, *arguments: str) -> subprocess.CompletedProcess[str]:
    runpod.requests.clear()
    return subprocess.run(
        [sys.executable, "scripts/invoke.py", ENDPOINT, *arguments],
        cwd=HERE, env=environment(runpod), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_job_that_was_not_taken_is_sent_again_and_a_status_is_asked_again(runpod: RunPod) -> None:
    runpod.refusals = [503, 429]
    done = invoke(runpod, "hello", "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert [action for _method, action in runpod.requests] == ["runsync"] * 3
    runpod.refusals = []
    before = len(runpod.jobs)
    job = runpod.submit("slow", {"prompt": "hello", "max_tokens": 3})
    runpod.wait(lambda: job.status in FINAL)
    from scripts.invoke import Endpoint

    runpod.refusals = [500, 0, 502]
    assert Endpoint(ENDPOINT, KEY, runpod.url).wait("slow")["tokens_generated"] <= 3
    assert len(runpod.jobs) == before + 1


def test_a_job_that_may_have_been_taken_is_not_sent_again(runpod: RunPod) -> None:
    runpod.refusals = [0]
    done = invoke(runpod, "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(runpod.requests) == 1
    runpod.refusals = [500]
    assert invoke(runpod, "hello").returncode == 1
    assert len(runpod.requests) == 1


def test_a_failed_job_is_one_line_with_its_code(runpod: RunPod) -> None:
    done = invoke(runpod, "hello", "--max-tokens", "99999")
    assert done.returncode == 1
    assert done.stderr.strip() == ("error: INVALID_INPUT: max_tokens must be an integer between 1 and 2048, not 99999")


def test_a_worker_that_is_told_to_end_finishes_its_jobs(store_env: dict[str, str], tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub2") as hub, RunPod().running() as runpod:
        write_model(hub.folder / "org" / "name", seed=1, context=2048, ends=False)
        env = store_env | {"HF_ENDPOINT": hub.url, "MODEL_ID": "org/name"} | runpod.env
        with serving(env) as process:
            job = runpod.submit(
                "long", {"prompt": "hello", "max_tokens": 1500, "temperature": 2, "top_p": 1, "stream": True}
            )
            assert runpod.wait(lambda: job.stream)
            process.send_signal(signal.SIGTERM)
            assert runpod.wait(lambda: job.status in FINAL)
            assert job.status == "COMPLETED"
            assert process.wait(30) == 0
