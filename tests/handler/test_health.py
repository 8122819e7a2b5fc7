"""`python -m handler.health`: what an engine of containers learns of the worker beside it."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handler.health import problem, worker_arguments
from modelstore.settings import Settings


@contextmanager
def answering(status: int, paths: list[str]) -> Iterator[int]:
    """A server that answers every path with a status; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def process(proc: Path, number: int, *words: str) -> None:
    (proc / str(number)).mkdir(parents=True)
    (proc / str(number) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))


def test_the_worker_is_told_from_other_processes(tmp_path: Path) -> None:
    process(tmp_path, 1, "/sbin/init")
    process(tmp_path, 7, "python", "-m", "handler.health")
    assert worker_arguments(tmp_path) is None
    (tmp_path / "8").mkdir()  # has just ended
    process(tmp_path, 9, "python3", "-m", "handler", "--http", "--port", "8001")
    assert worker_arguments(tmp_path) == ["--http", "--port", "8001"]


@pytest.mark.parametrize(
    ("status", "expected"), [(200, ""), (204, "the worker is starting"), (503, "the worker answers 503")]
)
def test_a_worker_over_http_is_asked(tmp_path: Path, status: int, expected: str) -> None:
    paths: list[str] = []
    with answering(status, paths) as port:
        env = {"PORT_HEALTH": str(port), "HEALTH_CHECK_PATH": "/alive"}
        assert problem(["--http"], Settings.from_env(env, root=tmp_path)) == expected
    assert paths == ["/alive"]
    reason = problem(["--http"], Settings.from_env(env, root=tmp_path))
    assert reason.startswith(f"no answer from port {port}: ")


def test_a_worker_of_a_queue_only_has_to_run(tmp_path: Path) -> None:
    settings = Settings.from_env({}, root=tmp_path)
    assert problem([], settings) == ""
    assert problem(None, settings) == "no worker runs here"


def test_the_command_says_it_and_its_exit_code(tmp_path: Path) -> None:
    """Under a PID namespace of its own, so that no other test's worker is seen."""
    if os.geteuid() != 0:
        pytest.skip("a namespace needs root")
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "handler.health"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "no worker runs here\n"), done.stderr
