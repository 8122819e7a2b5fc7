"""Certificates and proxies of the environment, for metadata and bytes alike, and what is said if they fail."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub

ALL = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture
def cli(store_env: dict[str, str], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Cli:
    write_repo(hub.folder / "org" / "name", random_tensors(2, (600, 600)))  # large enough for the hub's storage
    for name in (*ALL, *CERTIFICATES):
        monkeypatch.delenv(name, raising=False)
    return Cli(store_env)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """The certificate of an authority of its own; beside it, in server.pem, what it has issued to localhost."""
    run = [
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=own -keyout ca.key -out ca.pem",
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    ]
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost\n")
    for command in run:
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "server.pem").write_text((tmp_path / "server.key").read_text() + (tmp_path / "server.crt").read_text())
    return tmp_path / "ca.pem"


@pytest.fixture
def over_tls(authority: Path, hub: Hub) -> Iterator[str]:
    """The hub's address over TLS, with a certificate of that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.with_name("server.pem"))
    listener = socket.create_server(("127.0.0.1", 0))
    backend = urlsplit(hub.url)

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(plain: socket.socket) -> None:
        place = (str(backend.hostname), int(backend.port or 0))
        with (
            suppress(OSError),
            plain,
            context.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(place) as server,
        ):
            back = threading.Thread(target=copy, args=(server, client), daemon=True)
            back.start()
            copy(client, server)
            back.join(10)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"https://localhost:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


class _Proxy(BaseHTTPRequestHandler):
    """Forwards plain requests, and counts them."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        url = urlsplit(self.path)
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=20)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy")}
        connection.request(self.command, f"{url.path}?{url.query}" if url.query else url.path, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_arguments: object) -> None:
        """Silent."""


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy, and what it was asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def error_of(cli: Cli) -> str:
    (line,) = (line for line in cli("seed", "org/name", "-q", code=1).stderr.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_an_authority_of_the_environment_is_trusted(cli: Cli, over_tls: str, authority: Path, variable: str) -> None:
    cli.env |= {"HF_ENDPOINT": over_tls, variable: str(authority)}
    assert cli.json("seed", "org/name")["status"] == "downloaded"


def test_an_unknown_authority_is_named(cli: Cli, over_tls: str) -> None:
    cli.env["HF_ENDPOINT"] = over_tls
    line = error_of(cli)
    assert "authority that this host does not know" in line
    assert "SSL_CERT_FILE" in line


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_metadata_and_bytes_go_through_the_proxy(
    cli: Cli, hub: Hub, proxy: tuple[str, list[str]], variable: str
) -> None:
    address, asked = proxy
    cli.env[variable] = address
    assert cli.json("seed", "org/name")["status"] == "downloaded"
    served = [path for server, _method, path, _token in hub.served.requests]
    assert len(asked) == len(served), "none went past it"
    assert any("/api/models/" in path for path in asked)
    assert any("model.safetensors" in path for path in asked)


def test_hosts_that_want_no_proxy_get_none(cli: Cli, proxy: tuple[str, list[str]]) -> None:
    cli.env |= {"ALL_PROXY": proxy[0], "NO_PROXY": "127.0.0.1,localhost"}
    cli("seed", "org/name")
    assert not proxy[1]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_dead_proxy_is_named_without_its_password(cli: Cli, variable: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    cli.env[variable] = f"http://me:s3cr3t@{place}"
    line = error_of(cli)
    assert f"through the proxy {place}" in line
    assert "s3cr3t" not in line


def test_a_proxy_of_socks_is_refused_in_one_line(cli: Cli) -> None:
    cli.env["ALL_PROXY"] = "socks5://127.0.0.1:1"
    done = cli("seed", "org/name", "-q", code=2)
    assert "SOCKS" in done.stderr


def test_offline_as_the_hub_has_it(cli: Cli, hub: Hub) -> None:
    cli("seed", "org/name")
    asked = len(hub.served.requests)
    cli.env["HF_HUB_OFFLINE"] = "1"
    assert cli("seed", "org/name").stdout.startswith("present")
    assert "HF_HUB_OFFLINE" in cli("seed", "org/other", "-q", code=3).stderr
    assert len(hub.served.requests) == asked
