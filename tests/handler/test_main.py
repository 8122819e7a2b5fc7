"""`python -m handler` under the unmodified RunPod SDK, with a small random model and its own tokenizer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.runpod_api import RunPod
from tests.support.workers import serving

pytestmark = pytest.mark.slow


@pytest.fixture
def env(hub: Hub, store_env: dict[str, str]) -> dict[str, str]:
    write_model(hub.folder / "org" / "name", seed=1)
    write_model(hub.folder / "org" / "other", seed=2, template=False)
    return store_env | {"MODEL_ID": "org/name"}


def run(env: dict[str, str], *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "handler", *arguments],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def timeline_of(log: str) -> dict[str, Any]:
    lines = [line for line in log.splitlines() if line.startswith('{"timeline"')]
    assert len(lines) == 1
    assert len(lines[0]) < 4096
    record: dict[str, Any] = json.loads(lines[0])["timeline"]
    return record


def test_a_test_input_is_answered_and_the_start_is_one_record(env: dict[str, str], hub: Hub) -> None:
    job = json.dumps({"input": {"prompt": "hello world", "temperature": 0, "max_tokens": 5}})
    first = run(env, "--test_input", job)
    assert first.returncode == 0, first.stderr
    assert "'model': 'org/name'" in first.stdout
    record = timeline_of(first.stderr)
    assert record["outcome"] == "downloaded"
    assert {"lookup", "download", "publish", "read", "import", "build", "ready"} <= {s["name"] for s in record["spans"]}
    assert all(0 <= span["start"] <= span["end"] < 120 for span in record["spans"])
    hub.served.reset()
    second = run(env, "--test_input", job)
    assert timeline_of(second.stderr)["outcome"] == "hit"
    assert hub.served.requests == []


def test_a_worker_whose_snapshot_went_bad_answers_as_before(env: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    job = json.dumps({"input": {"prompt": "hello world", "temperature": 0, "max_tokens": 5}})
    right = run(env, "--test_input", job)
    (weights,) = (tmp_path / "volume").rglob("models/*/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-100] ^= 64
    weights.write_bytes(data)
    hub.served.reset()
    mended = run(env, "--test_input", job)
    assert mended.returncode == 0, mended.stderr
    record = timeline_of(mended.stderr)
    assert "damaged" in record["reason"]
    assert {"verify", "download", "publish", "ready"} <= {span["name"] for span in record["spans"]}
    assert "differs from the published bytes" in mended.stderr
    answers = [[line for line in done.stdout.splitlines() if "generated_text" in line] for done in (right, mended)]
    assert answers[0] == answers[1] != []
    assert hub.served.bytes["model.safetensors"]


def test_changing_model_id_swaps_the_model_and_both_stay(env: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    job = json.dumps({"input": {"prompt": "hello", "temperature": 0, "max_tokens": 3}})
    for name in ("org/name", "org/other", "org/name"):
        done = run(env | {"MODEL_ID": name}, "--test_input", job)
        assert f"'model': '{name}'" in done.stdout
    assert timeline_of(done.stderr)["outcome"] == "hit"
    models_folder = tmp_path / "volume" / "modelstore" / "models"
    assert sorted(path.name for path in models_folder.iterdir()) == ["org--name", "org--other"]


def post(port: int, job_input: object) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/runsync",
        json.dumps({"input": job_input}).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=240) as response:
                result: dict[str, Any] = json.load(response)
                return result
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_the_local_api_answers_good_jobs_and_bad_ones_and_lives_on(env: dict[str, str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    with serving(env, *arguments):
        greedy = {"temperature": 0, "max_tokens": 4}
        prompt = post(port, {"prompt": "hello world"} | greedy)["output"]
        assert prompt["parameters"] == {"max_tokens": 4, "temperature": 0.0, "top_p": 0.9}
        assert 1 <= prompt["tokens_generated"] <= 4
        assert prompt == post(port, {"prompt": "hello world"} | greedy)["output"]
        chat = post(port, {"messages": [{"role": "user", "content": "hello"}]} | greedy)["output"]
        assert chat["model"] == "org/name"
        sampled = post(port, {"prompt": "hello", "temperature": 1.5, "top_p": 0.5, "max_tokens": 3})["output"]
        assert sampled["tokens_generated"] <= 3
        for bad, words in [
            ({"prompt": ""}, "prompt"),
            ({"prompt": "hello", "max_tokens": 2000}, "context of 64 tokens"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "no robots"),
            ({"prompt": "hello", "model": "org/other"}, "org/other"),
        ]:
            failed = post(port, bad)
            assert words in failed["error"]
        assert post(port, {"prompt": "hello world"} | greedy)["output"] == prompt


def test_the_production_loop_takes_jobs_and_posts_answers_and_errors(env: dict[str, str]) -> None:
    with RunPod().running() as runpod, serving(env | {"MODEL_ID": "org/other"} | runpod.env):
        runpod.submit("good", {"prompt": "hello world", "temperature": 0, "max_tokens": 3})
        job_id, body = runpod.result()
        assert job_id == "good"
        assert body["output"]["model"] == "org/other"
        runpod.submit("bad", {"prompt": 7})
        job_id, body = runpod.result()
        assert (job_id, body["output"]) == ("bad", {"code": "INVALID_INPUT"})
        assert "prompt must be a string" in body["error"]
        runpod.submit("no template", {"messages": [{"role": "user", "content": "hello"}]})
        assert "no chat template" in runpod.result()[1]["error"]
        runpod.submit("again", {"prompt": "hello", "temperature": 0, "max_tokens": 1})
        assert runpod.result()[1]["output"]["tokens_generated"] == 1
        deadline = time.monotonic() + 60
        while not runpod.pings:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"MODEL_ID": ""}, 2, "MODEL_ID is not set"),
        ({"MODEL_ID": "what is this"}, 2, "MODEL_ID"),
        ({"MODEL_ID": "org/unknown"}, 3, "org/unknown"),
        ({"MODEL_DTYPE": "int3"}, 2, "MODEL_DTYPE"),
        ({"MODELSTORE_OFFLINE": "1"}, 3, "MODELSTORE_OFFLINE"),
        ({"MODEL_ID": "org/name@v7"}, 3, "v7"),
        ({"MODELSTORE_ALLOWED_MODELS": "org/other"}, 8, "MODELSTORE_ALLOWED_MODELS"),
        ({"MODELSTORE_ROOT": "/proc/nope"}, 1, "MODELSTORE_ROOT"),
    ],
)
def test_a_start_that_fails_exits_with_its_code_and_its_reason_last(
    env: dict[str, str], changes: dict[str, str], code: int, words: str
) -> None:
    done = run(env | changes)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code, done.stderr
    assert last.startswith("start failed: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_a_start_that_panics_says_so_on_its_last_line_and_forges_none(monkeypatch: Any, capfd: Any) -> None:
    """As a damaged tokenizer.json makes the tokenizers library do; its exception is no Exception."""
    import handler.__main__ as start

    class PanicException(BaseException):
        pass

    def panics() -> None:
        raise PanicException("oh\nstart failed: forged")

    monkeypatch.setattr(start, "start", panics)
    assert start.main() == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "start failed: PanicException: oh start failed: forged"
    assert len([line for line in lines if line.startswith("start failed")]) == 1
