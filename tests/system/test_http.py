"""`python -m handler --http` as a process: its health from the first moment to the last, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.workers import free_port, serving_http

KEY = "a-key-of-sixteen"
LONG = {"prompt": "hello", "max_tokens": 1500, "temperature": 2, "stream": True}


def health(url: str) -> int | None:
    try:
        return httpx.get(f"{url}/ping", timeout=5, trust_env=False).status_code
    except httpx.TransportError:
        return None


def test_health_is_204_then_200_and_a_signal_lets_what_runs_end(hub: Hub, store_env: dict[str, str]) -> None:
    write_model(hub.folder / "org" / "name", seed=1, context=2048, ends=False)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = os.environ | store_env | {"MODEL_ID": "org/name", "PORT": str(port), "MODELSTORE_API_KEY": KEY}
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "handler", "--http"], env=env, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    assert process.stderr is not None
    follower = threading.Thread(target=log.extend, args=(process.stderr,))
    follower.start()
    try:
        seen: dict[int | None, float] = {}
        while 200 not in seen:
            assert process.poll() is None, log
            assert time.monotonic() - began < 240
            seen.setdefault(health(url), time.monotonic() - began)
            time.sleep(0.05)
        assert list(seen) in ([None, 204, 200], [204, 200]), "it is never refused again before it is ready"
        assert seen[204] < seen[200] / 2
        assert "runpod" not in "".join(line for line in log if line.startswith('{"timeline"'))
        refused = httpx.post(f"{url}/generate", json=LONG, trust_env=False)
        assert refused.status_code == 401

        headers, last = {"Authorization": f"Bearer {KEY}"}, None
        with httpx.stream("POST", f"{url}/generate", json=LONG, headers=headers, timeout=60, trust_env=False) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    if last is None:
                        process.send_signal(signal.SIGTERM)
                    last = json.loads(line[len("data: ") :])
        assert last is not None
        assert last["finished"], "it was answered to its end"
        assert last["tokens_generated"] == 1500
        assert process.wait(30) == 0
        follower.join()
        assert not [line for line in log if line.startswith("Traceback")]
        assert KEY not in "".join(log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        follower.join()
        process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        (("--http", "--port", "http"), {}, 2, "--port 'http' is not a port"),
        (("--http", "--rp_serve_api"), {}, 2, "--rp_serve_api is not known beside --http"),
        (("--http",), {"PORT": "0"}, 2, "PORT '0' is not a port"),
        (("--http",), {"MODELSTORE_API_KEY": "short"}, 2, "MODELSTORE_API_KEY is too short"),
        (
            ("--http",),
            {"MODELSTORE_API_KEY": "a key of sixteen"},
            2,
            "MODELSTORE_API_KEY holds characters that no token has",
        ),
        (("--http",), {"HEALTH_CHECK_PATH": "ping"}, 2, "HEALTH_CHECK_PATH='ping' is not a path"),
        (("--http", "--host", "192.0.2.1"), {}, 2, "192.0.2.1 port 8000 cannot be opened"),
    ],
)
def test_a_place_that_is_none_is_one_line(
    store_env: dict[str, str], arguments: tuple[str, ...], env: dict[str, str], code: int, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "handler", *arguments],
        env=os.environ | store_env | {"MODEL_ID": "org/name"} | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("start failed: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_an_alias_that_moves_is_followed_between_requests(hub: Hub, store_env: dict[str, str]) -> None:
    for number, name in enumerate(("first", "second")):
        write_model(hub.folder / "org" / name, seed=number, ends=False)
    env = store_env | {"MODEL_ID": "@chat"}

    def point(name: str) -> None:
        command = [sys.executable, "-m", "modelstore", "alias", "set", "chat", f"org/{name}", "--yes"]
        subprocess.run(command, env=os.environ | env, check=True, capture_output=True, timeout=120)

    point("first")
    with serving_http(env) as url:
        ask = {"prompt": "hello", "max_tokens": 2}
        answer = httpx.post(f"{url}/generate", json=ask, timeout=60, trust_env=False).json()
        assert answer["output"]["model"] == "org/first"
        point("second")
        until = time.monotonic() + 120
        while answer["output"]["model"] != "org/second":
            assert time.monotonic() < until
            answer = httpx.post(f"{url}/generate", json=ask, timeout=60, trust_env=False).raise_for_status().json()
            time.sleep(0.2)
        assert health(url) == 200
