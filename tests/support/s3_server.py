"""A real S3 server (moto's, a process of its own) behind a proxy that shows RunPod's quirks if a test asks for them."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "vol123"


@dataclass
class Fault:
    """Answer with `status` what `method` and `path` match, so many times; `after`: once the server has done it."""

    method: str
    path: str
    status: int
    times: int = 1
    after: bool = False


@dataclass
class S3:
    url: str
    backend: int
    slow_s: float = 0.0  # how long each part takes
    ignores_conditions: bool = False
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, region_name="EU-RO-1", aws_access_key_id="k", aws_secret_access_key="s"
        )

    def listing(self) -> dict[str, int]:
        found = self.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {one["Key"]: one["Size"] for one in found}

    def read(self, key: str) -> bytes:
        return bytes(self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read())


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    s3: S3

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.s3.fault_for(self.command, self.path)
        if "partNumber" in self.path:
            time.sleep(self.s3.slow_s)
        if fault is not None and not fault.after:
            self._refuse(fault.status)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.s3.backend, timeout=240)
        try:
            headers = dict(self.headers)
            if self.s3.ignores_conditions:
                headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self._refuse(0)
            return
        finally:
            connection.close()
        if fault is not None:
            self._refuse(fault.status)
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int) -> None:
        if status == 0:  # the connection breaks
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silent."""


@contextmanager
def moto(*options: str) -> Iterator[int]:
    """moto's server, in a process of its own; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def create_volume(client: Any) -> None:
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "EU-RO-1"})


@contextmanager
def running_s3() -> Iterator[S3]:
    """A server with one empty volume."""
    with moto() as port:
        s3 = S3("", port)
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"s3": s3}))
        s3.url = f"http://127.0.0.1:{proxy.server_address[1]}"
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            create_volume(s3.client())
            yield s3
        finally:
            proxy.shutdown()
            proxy.server_close()
