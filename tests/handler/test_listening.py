"""The ports of a worker that starts, up to the moment at which its server takes them over."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest

from handler.listening import Address, Listening
from modelstore.errors import InvalidSetting
from tests.handler.test_http import CHAT, eventually
from tests.support.workers import free_port


def begun() -> Listening:
    """A port that is open, and answers as long as the worker starts."""
    port = free_port()
    starting = Listening(Address("127.0.0.1", port, port), "/health")
    starting.begin()
    return starting


def test_health_is_told_while_the_worker_starts() -> None:
    starting = begun()
    port = starting.address.port
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/health?x=1", trust_env=False).status_code == 204
    refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT, trust_env=False)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "5"
    assert refused.json()["error"]["message"] == "the worker is starting"
    with pytest.raises(InvalidSetting, match=f"127.0.0.1 port {port} cannot be opened: Address already in use"):
        Listening(Address("127.0.0.1", port, port), "/health")
    silent = socket.create_connection(("127.0.0.1", port))
    halfway = socket.create_connection(("127.0.0.1", port))
    halfway.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n")
    assert eventually(lambda: len(starting._heads) == 2 and any(starting._heads.values()))
    (kept,) = starting.end()
    assert silent.recv(100) == b""
    assert halfway.recv(100).startswith(b"HTTP/1.1 503 Service Unavailable\r\n"), "its sender tries again"
    halfway.close()
    with socket.create_connection(("127.0.0.1", port)) as waits:
        connection, _address = kept.accept()
        waits.sendall(b"x")
        assert connection.recv(1) == b"x", "it is answered by whoever takes the port over"
        connection.close()
    silent.close()
    kept.close()


def test_a_question_for_health_that_is_half_there_at_the_handover_is_told_that_the_worker_starts() -> None:
    starting = begun()
    port = starting.address.port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as halfway:
        halfway.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n")
        assert eventually(lambda: any(starting._heads.values()))
        (kept,) = starting.end()
        assert halfway.recv(100).startswith(b"HTTP/1.1 204 No Content\r\n")
    kept.close()


def test_no_connection_is_lost_at_the_handover() -> None:
    """Each one is answered by the ports before, or is accepted by the server after."""
    for _round in range(10):
        starting = begun()
        port = starting.address.port
        outcomes: list[bytes] = []
        ended = threading.Event()

        def ask(port: int = port, ended: threading.Event = ended, outcomes: list[bytes] = outcomes) -> None:
            while not ended.is_set():
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
                    outcomes.append(connection.recv(12))

        clients = [threading.Thread(target=ask) for _number in range(8)]
        for client in clients:
            client.start()
        time.sleep(0.05)
        (kept,) = starting.end()
        kept.settimeout(0.2)
        ended.set()
        with suppress(TimeoutError):
            while True:
                connection, _address = kept.accept()
                connection.sendall(b"HTTP/1.1 200")
                connection.close()
        for client in clients:
            client.join()
        kept.close()
        assert set(outcomes) <= {b"HTTP/1.1 503", b"HTTP/1.1 200"}, "a client waited in vain"
