"""The worker over HTTP: real requests to the real server, with an engine that does as a test asks."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from handler import http_protocol, http_requests, http_server, listening
from handler.answers import Answer, TextDelta, whole
from handler.errors import JobError
from handler.http_requests import MOST_BYTES, Requests
from handler.http_server import configured, limited
from handler.jobs import JobContext
from handler.listening import Address
from handler.worker import Worker
from modelstore.errors import InvalidSetting, UsageError
from modelstore.settings import Settings
from tests.support.workers import Engine

SETTINGS = Settings(root=Path("/nowhere"))
KEY = "sixteen-characters"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Served:
    """A worker behind HTTP, and a client of it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.worker = Worker(engine, settings, timeline={"spans": [{"name": "read", "start": 0.0, "end": 1.5}]})
        self.requests = Requests(self.worker, settings)
        config = configured(self.worker, self.requests, settings)
        self.server = http_server._Server(config, self.worker, self.requests, lambda: None)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port: int = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20, trust_env=False)

    def sent(self, head: str, body: bytes = b"") -> bytes:
        """The answer to bytes on a connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
            answer = b""
            with suppress(ConnectionResetError):  # it was closed before all of it was read
                while part := connection.recv(1 << 16):
                    answer += part
            return answer


@contextmanager
def served(engine: Engine | None = None, **settings: Any) -> Iterator[Served]:
    made = Served(engine or Engine(), replace(SETTINGS, **settings))
    made.thread.start()
    try:
        with made.client:
            yield made
    finally:
        made.server.should_exit = True
        made.thread.join(20)
        assert not made.thread.is_alive()


@contextmanager
def asking(http: Served, body: Any, path: str = "/v1/chat/completions") -> Iterator[socket.socket]:
    """A connection on which a request was sent, and nothing is read."""
    data = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.connect(("127.0.0.1", http.port))
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


def eventually(is_so: Callable[[], object], within_s: float = 30.0) -> bool:
    until = time.monotonic() + within_s
    while not is_so() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(is_so())


def events_of(text: str) -> list[Any]:
    return [json.loads(line[len("data: ") :]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_job_is_answered_as_runsync_does() -> None:
    with served() as http:
        for body in ({"prompt": "hi"}, {"input": {"prompt": "hi"}}):
            answer = http.client.post("/generate", json=body).raise_for_status().json()
            assert answer["status"] == "COMPLETED"
            assert answer["output"]["generated_text"] == "hi there"
            assert answer["id"]
            assert min(answer["delayTime"], answer["executionTime"]) >= 0
        status = http.client.post("/generate", json={"op": "status"}).json()["output"]
        assert status["jobs"]["completed"] == 2


def test_openais_routes_are_answered_whole_and_as_events() -> None:
    with served(Engine(takes_s=0.05)) as http:
        whole = http.client.post("/v1/chat/completions", json=CHAT).raise_for_status().json()
        assert whole["choices"][0]["message"]["content"] == "hi there"
        arrived = []
        with http.client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            for line in stream.iter_lines():
                arrived.append((time.monotonic(), line))
        lines = [line for _at, line in arrived if line]
        assert lines[-1] == "data: [DONE]"
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events_of("\n".join(lines)))
        assert text == "hi there"
        assert arrived[-1][0] - arrived[0][0] > 0.03, "the first piece came before the last was made"
        assert http.client.get("/v1/models").json()["data"][0]["id"] == "org/name"
        assert http.client.get("/v1/models/org/name").json()["object"] == "model"
        assert http.client.get("/v1/models/org/other").json()["error"]["message"].startswith("org/other is not served")


def test_a_native_stream_is_events_too() -> None:
    with served() as http:
        text = http.client.post("/generate", json={"prompt": "hi", "stream": True}).raise_for_status().text
        chunks = events_of(text)
        assert [chunk["token"] for chunk in chunks if not chunk["finished"]] != []
        assert chunks[-1]["generated_text"] == "hi there"


@pytest.mark.parametrize(
    ("path", "body", "status", "phrase"),
    [
        ("/v1/chat/completions", CHAT | {"temperature": 9}, 400, "temperature must be"),
        ("/v1/chat/completions", CHAT | {"model": "gpt-5"}, 404, "this worker serves org/name"),
        ("/v1/audio/speech", {"input": "a"}, 400, "openai_route must be one of"),
        ("/generate", {"prompt": "hi", "temperature": 9}, 400, "temperature must be"),
        ("/generate", {}, 400, "prompt"),
        ("/nothing", {}, 404, "Not Found"),
        ("/ping", {}, 405, "Method Not Allowed"),
    ],
)
def test_an_error_has_its_status_and_says_what_to_do(path: str, body: Any, status: int, phrase: str) -> None:
    with served() as http:
        answer = http.client.post(path, json=body)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert phrase in (error["message"] if isinstance(error, dict) else error)
        assert http.client.get("/ping").status_code == 200


def test_an_error_midway_ends_a_stream_and_an_error_before_it_has_a_status() -> None:
    with served(Engine(TextDelta(0, "hi", 1), error=JobError.__new__(JobError))) as http:
        http.engine.error = RuntimeError("broken")
        text = http.client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
        assert "broken" in events_of(text)[-1]["error"]["message"]
        assert text.rstrip().endswith("data: [DONE]")
        assert http.client.post("/v1/chat/completions", json=CHAT).status_code == 500
    with served(Engine(error=MemoryError())) as http:
        http.engine.pieces = ()
        assert http.client.post("/v1/chat/completions", json=CHAT | {"stream": True}).status_code == 503


@pytest.mark.parametrize(
    ("body", "status", "phrase"),
    [
        (b"", 400, "the body is no JSON"),
        (b"{", 400, "the body is no JSON"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"[1]", 400, "the body must be a JSON object"),
        (b"null", 400, "the body must be a JSON object"),
        (b" " * (MOST_BYTES + 1), 413, "at most 30.00 MB"),
        (b'{"prompt": "' + b"a" * 2_000_000 + b'"}', 400, "characters"),
        (b'{"prompt": "\\ud800"}', 400, "half a character"),
    ],
    ids=["nothing", "half", "no text", "deep", "list", "null", "too large", "long", "surrogate"],
)
def test_a_body_that_is_none_is_refused_in_one_line(body: bytes, status: int, phrase: str) -> None:
    with served() as http:
        for path in ("/generate", "/v1/completions"):
            answer = http.client.post(path, content=body)
            assert answer.status_code == status
            error = answer.json()["error"]
            message = error["message"] if isinstance(error, dict) else error
            assert phrase in message
            assert "\n" not in message
        assert http.requests._held_bytes == 0
        assert http.client.get("/ping").status_code == 200


def test_a_body_without_an_end_is_cut_off_at_the_limit() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * (1 << 20)

    with served() as http:
        with suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):  # it is cut off while it sends
            assert http.client.post("/generate", content=endless()).status_code == 413
        assert http.client.get("/ping").status_code == 200
        assert eventually(lambda: http.requests._held_bytes == 0)


def test_a_form_is_refused() -> None:
    with served() as http:
        assert http.client.post("/v1/audio/transcriptions", files={"file": b"RIFF"}).status_code == 415


def test_a_key_is_asked_for_but_not_by_the_health() -> None:
    with served(api_key=KEY) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-API-Key": "é"}):
            raw = {name: value.encode() for name, value in headers.items()}
            for path in ("/v1/chat/completions", "/generate"):
                answer = http.client.post(path, json=CHAT, headers=raw)
                assert answer.status_code == 401
                assert KEY not in answer.text
            assert http.client.get("/v1/models", headers=raw).status_code == 401
            assert http.client.get("/metrics", headers=raw).status_code == 401
        assert http.client.get("/ping").status_code == 200
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY, "Authorization": "Bearer RunPod's"}):
            assert http.client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_ends_if_the_client_goes_away(stream: bool) -> None:
    many = [TextDelta(0, "a", 1) for _ in range(500)]
    with served(Engine(*many, takes_s=0.02)) as http:
        with asking(http, CHAT | {"stream": stream}):
            assert eventually(lambda: not http.worker.is_idle)
        assert eventually(lambda: http.worker.is_idle, 5)
        assert eventually(lambda: http.engine.left == ["early"])
        assert http.worker.status()["jobs"]["cancelled"] == 1


def test_one_that_waits_and_goes_away_is_never_begun() -> None:
    with served(Engine(takes_s=0.3), max_concurrency=1) as http:
        first = threading.Thread(target=lambda: http.client.post("/generate", json={"prompt": "hi"}))
        first.start()
        assert eventually(lambda: not http.worker.is_idle)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{http.port}/generate", json={"prompt": "hi"}, timeout=0.1, trust_env=False)
        first.join()
        assert eventually(lambda: http.requests.waiting == 0)
        time.sleep(0.2)
        assert http.worker.status()["jobs"] == {"running": 0, "completed": 1, "failed": 0, "cancelled": 0}
        assert http.requests._held_bytes == 0


def test_no_more_jobs_run_at_once_than_the_worker_takes() -> None:
    with served(Engine(takes_s=0.05), max_concurrency=2) as http:
        most = 0

        async def all_at_once() -> list[int]:
            async with httpx.AsyncClient(base_url=http.client.base_url, timeout=30, trust_env=False) as client:
                answers = asyncio.gather(*(client.post("/generate", json={"prompt": "hi"}) for _ in range(12)))
                nonlocal most
                while not answers.done():
                    most = max(most, http.worker.status()["jobs"]["running"])
                    await asyncio.sleep(0.01)
                return [answer.status_code for answer in await answers]

        assert asyncio.run(all_at_once()) == [200] * 12
        assert most == 2


def test_too_many_that_wait_are_sent_away_and_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "_MOST_WAITING", 1)
    with served(Engine(takes_s=1.0), max_concurrency=1) as http:
        ask = partial(http.client.post, "/generate", json={"prompt": "hi"})
        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert eventually(lambda: not http.worker.is_idle)
        threads[1].start()
        assert eventually(lambda: http.requests.waiting == 1)
        answer = http.client.post("/generate", json={"prompt": "hi"})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert http.client.get("/ping").status_code == 200
        for thread in threads:
            thread.join()


class Large(Engine):
    """Answers with 10 MB at once."""

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        return whole({"picture": "a" * 10_000_000})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_stops_to_read_loses_its_connection_and_its_slot(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(http_protocol, "TAKEN_S", 0.5)
    engine = Engine(*[TextDelta(0, "a" * 100_000, 1) for _ in range(300)]) if stream else Large()
    with served(engine, max_concurrency=1) as http, asking(http, CHAT | {"stream": stream}) as connection:
        connection.settimeout(20)
        assert eventually(lambda: http.requests._unanswered)
        assert eventually(lambda: not http.server.server_state.connections), "though it did not go away"
        assert eventually(lambda: http.requests.is_idle)
        http.engine.pieces = (TextDelta(0, "hi", 1, "stop", 1),)
        assert http.client.get("/ping").status_code == 200


def test_a_client_that_reads_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "TAKEN_S", 3.0)
    with served(Large()) as http, asking(http, {"prompt": "hi"}, "/generate") as connection:
        count, began = 0, time.monotonic()
        while count < 10_000_000:
            part = connection.recv(1 << 16)
            assert part, f"it was cut off after {count} bytes"
            count += len(part)
            time.sleep(0.008)
        assert time.monotonic() - began > 3.0, "it took longer than a client may read nothing"


def test_answers_that_are_not_taken_count_as_held_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "_MOST_HELD_BYTES", 15_000_000)
    monkeypatch.setattr(http_requests, "_TAKEN_S", 6.0)
    with served(Large()) as http, ExitStack() as stack:
        slow = [stack.enter_context(asking(http, {"prompt": "hi"}, "/generate")) for _ in range(2)]
        assert eventually(lambda: http.requests._held_bytes > 15_000_000), "both answers wait"
        refused = http.client.post("/generate", json={"prompt": "hi"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert eventually(lambda: not http.requests._held_bytes)
        for connection in slow:
            count = 0
            with suppress(ConnectionError):
                while part := connection.recv(1 << 20):
                    count += len(part)
            assert count < 10_000_000, "its end is not sent"
        assert http.client.post("/generate", json={"prompt": "hi"}).status_code == 200


def test_a_connection_on_which_no_request_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 1.5)
    with served(Engine(takes_s=1.0)) as http:
        with socket.create_connection(("127.0.0.1", http.port), timeout=10) as silent, suppress(ConnectionResetError):
            assert silent.recv(1) == b""
        with socket.create_connection(("127.0.0.1", http.port), timeout=10) as drips, suppress(OSError):
            for _ in range(100):
                drips.sendall(b"G")
                time.sleep(0.05)
            pytest.fail("it may send for ever")
        assert http.client.post("/generate", json={"prompt": "hi"}).status_code == 200, "a long answer is none of that"


def test_bodies_that_come_at_once_are_held_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "_MOST_HELD_BYTES", 1_000_000)
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 600000\r\n\r\n"
    with served() as http, ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", http.port), timeout=10)) for _ in range(5)]
        for connection in many:
            connection.sendall(head + b'{"prompt": "')
        assert eventually(lambda: http.requests.waiting == 5), "one whose body is on its way waits, too"
        for connection in many:
            connection.sendall(b"a" * 500_000)
        assert eventually(lambda: http.requests.waiting <= 2)
        assert http.requests._held_bytes <= 1_100_000
        refused = 0
        for connection in many:
            connection.settimeout(1)
            with suppress(TimeoutError):
                refused += connection.recv(1 << 16).startswith(b"HTTP/1.1 503")
        assert refused >= 3
        assert http.client.get("/ping").status_code == 200
    assert eventually(lambda: http.requests._held_bytes == 0)


def test_a_body_of_many_small_values_is_refused_before_it_is_parsed() -> None:
    body = b'{"prompt": [' + b"[]," * 5_000_000 + b"[]]}"
    with served() as http:
        began = time.monotonic()
        answer = http.client.post("/generate", content=body)
        assert answer.status_code == 400
        assert "at most 1000000 values" in answer.json()["error"]["message"]
        assert time.monotonic() - began < 5


def test_the_wait_for_a_turn_counts_into_the_limit_of_time() -> None:
    with served(Engine(takes_s=30), max_concurrency=1, max_job_s=3.0) as http:
        codes: list[int] = []
        began = time.monotonic()
        ask = lambda: codes.append(http.client.post("/v1/chat/completions", json=CHAT).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: http.requests.waiting == 2)
        status = http.client.post("/generate", json={"op": "status"}).json()["output"]
        assert status["jobs"]["running"] >= 1, "its answer takes no turn"
        assert http.client.get("/v1/models").status_code == 200
        assert time.monotonic() - began < 2.9
        for thread in threads:
            thread.join()
        assert codes == [504] * 3
        assert time.monotonic() - began < 8


def test_a_number_that_json_has_not_is_an_error() -> None:
    class Broken(Engine):
        async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
            return whole({"vectors": [float("nan")]})

    with served(Broken()) as http:
        answer = http.client.post("/generate", json={"texts": ["a"]})
        assert answer.status_code == 500
        assert answer.json()["output"] == {"code": "INTERNAL_ERROR"}
        answer = http.client.post("/v1/embeddings", json={"input": "a"})
        assert (answer.status_code, "NaN" in answer.json()["error"]["message"]) == (500, True)


def test_a_thousand_idle_connections_and_a_flood_of_bad_requests_leave_the_health_true() -> None:
    listening._allow_many_connections()
    with served() as http:
        idle = [socket.create_connection(("127.0.0.1", http.port)) for _ in range(1000)]
        try:
            for connection in idle[:200]:
                connection.sendall(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
            assert http.client.get("/ping").status_code == 200
            for number in range(300):
                assert http.client.post("/generate", content=b"{" * (number + 1)).status_code == 400
            assert http.sent("GET /" + "a" * 200_000 + " HTTP/1.1\nHost: a\n").startswith(b"HTTP/1.1 4")
            assert http.sent("no request at all\n").startswith(b"HTTP/1.1 4")
            assert http.client.post("/generate", json={"prompt": "hi"}).status_code == 200
            assert http.client.get("/ping").status_code == 200
        finally:
            for connection in idle:
                connection.close()
        assert eventually(lambda: http.requests._held_bytes == 0)


def test_a_worker_that_is_to_be_replaced_answers_until_the_load_balancer_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "_LEAVES_AFTER_S", 3.0)
    with served() as http:
        http.worker.replace("@chat points elsewhere")
        assert http.client.get("/ping").status_code == 503
        assert http.client.post("/generate", json={"prompt": "a"}).status_code == 200
        http.thread.join(10)
        assert not http.thread.is_alive()


def test_a_broken_worker_refuses_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_LEAVES_AFTER_S", 3.0)
    with served() as http:
        http.engine.broken = "the GPU is lost"
        refused = http.client.post("/generate", json={"prompt": "a"})
        assert (refused.status_code, http.client.get("/ping").status_code) == (503, 503)
        assert refused.headers["Retry-After"]
        http.thread.join(10)
        assert not http.thread.is_alive()


def test_metrics_count_the_jobs() -> None:
    with served() as http:
        http.client.post("/generate", json={"prompt": "hi"})
        http.client.post("/generate", json={})
        text = http.client.get("/metrics").text
        assert 'modelstore_worker_jobs_total{outcome="completed"} 1.0' in text
        assert 'modelstore_worker_jobs_total{outcome="failed"} 1.0' in text
        assert 'modelstore_worker_start_seconds{span="read"} 1.5' in text
        assert 'model="org/name"' in text


def test_behind_runpod_a_request_ends_before_the_load_balancer_ends_it() -> None:
    assert limited(SETTINGS).max_job_s == 600
    on_runpod = replace(SETTINGS, on_runpod=True)
    assert limited(on_runpod).max_job_s == limited(replace(on_runpod, max_job_s=0)).max_job_s == 325
    assert limited(replace(on_runpod, max_job_s=60)).max_job_s == 60
    assert limited(SETTINGS).max_result_bytes == MOST_BYTES
    assert limited(replace(SETTINGS, max_result_bytes=5)).max_result_bytes == 5


def test_the_place_follows_the_command_line_the_settings_and_the_host() -> None:
    def address(*arguments: str, **settings: Any) -> Address:
        return Address.of(["--http", *arguments], replace(SETTINGS, **settings))

    assert address() == Address("127.0.0.1", 8000, 8000)
    assert address(on_runpod=True) == Address("0.0.0.0", 80, 80)
    assert address(on_runpod=True, http_port="5000") == Address("0.0.0.0", 5000, 80), "as the platform has it"
    assert address(on_runpod=True, http_port="5000", health_port="5001") == Address("0.0.0.0", 5000, 5001)
    assert address("--port", "9000", "--host", "::1", http_port="5000") == Address("::1", 9000, 9000)
    for text in ("0", "65536", "http", "-1", "٣"):
        with pytest.raises(InvalidSetting, match="is not a port"):
            address("--port", text)
        with pytest.raises(InvalidSetting, match="PORT"):
            address(http_port=text)
    with pytest.raises(UsageError, match="--rp_serve_api is not known beside --http"):
        address("--rp_serve_api")
    with pytest.raises(UsageError, match="--port"):
        address("--port")
