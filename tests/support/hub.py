"""A small hub that speaks the Hub's HTTP protocol, for tests, the demo and the benchmarks.

    python tests/support/hub.py FOLDER [--port N] [--bytes-per-s N]      FOLDER holds org/name/<the repo's files>

Two servers, as with the real one: the hub (metadata, small files) and its storage, which large files are redirected to
under another address with a signed query string. Served bytes are counted; faults are set on `hub.faults`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_BYTES = 1 << 20
SIGNATURE = "X-Amz-Signature=s3cr3t-signature"


@dataclass
class Faults:
    """What goes wrong. Each `*_once` maps a file name to how often it still happens."""

    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes of a response, then the connection is cut
    status: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)  # by file name or "metadata"
    ignore_ranges: bool = False
    flip_byte: set[str] = field(default_factory=set)  # files whose last byte is served flipped, always
    flip_byte_once: set[str] = field(default_factory=set)
    wrong_first: dict[str, Path] = field(default_factory=dict)  # files of the same size that are served before, once
    stated_size: dict[str, int] = field(default_factory=dict)
    tree_page: int = 1000
    metadata_delay_s: float = 0.0
    silent: set[str] = field(default_factory=set)  # parts of addresses that are never answered
    held: dict[str, threading.Event] = field(default_factory=dict)
    bytes_per_s: float = 0.0  # over all connections together
    extra_names: list[str] = field(default_factory=list)  # listed in the tree as they are


@dataclass
class Served:
    """What was served, by file name, and each request as (server, method, path, had a token)."""

    bytes: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str, str, bool]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def metadata_calls(self) -> list[str]:
        return [path for server, _, path, _ in self.requests if server == "hub" and path.startswith("/api/")]

    def reset(self) -> None:
        with self.lock:
            self.bytes.clear()
            self.requests.clear()


class Hub:
    """The two servers over one folder of repos. `gated` and `private` name repos that want `token`, `renamed` gives
    the present names of repos by their old ones."""

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        self.folder = folder
        self.faults = Faults()
        self.served = Served()
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_test_token_0123456789"
        self.renamed: dict[str, str] = {}
        self.revisions: dict[tuple[str, str], Path] = {}
        self.throttle = threading.Lock()
        self._wrong_left: dict[str, int] = {}
        self._servers = [_Server(self, "hub", port), _Server(self, "storage", 0)]
        self._running = False
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.storage_url = f"http://localhost:{self._servers[1].server_port}"

    def start(self) -> None:
        self._running = True
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if not self._running:
            return
        self._running = False
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def present_name(self, repo: str) -> str:
        """The id of a repo that is asked for under an old name or in other capitals; empty if the name is its id."""
        if (self.folder / repo).is_dir():
            return ""
        owner, _, name = self.renamed.get(repo, repo).partition("/")
        known = [path.name for path in self.folder.glob(f"{owner}/*")]
        return next((f"{owner}/{each}" for each in known if each.lower() == name.lower()), "")

    def repo_folder(self, repo: str, revision: str) -> Path | None:
        """The folder that a revision (branch, tag or commit) of a repo is served from."""
        main = self.folder / repo
        if not main.is_dir():
            return None
        candidates = {"main": main} | {rev: path for (name, rev), path in self.revisions.items() if name == repo}
        for name, path in candidates.items():
            if revision in (name, self.commit(path)):
                return path
        return None

    def take_wrong(self, name: str, size: int, length: int) -> Path:
        """The file to serve `length` bytes of instead of those of `name`; once all were, the right ones follow."""
        wrong = self.faults.wrong_first[name]
        with self.served.lock:
            left = self._wrong_left[name] = self._wrong_left.get(name, size) - length
            if left <= 0:
                del self.faults.wrong_first[name]
        return wrong

    def commit(self, folder: Path) -> str:
        """A commit id made from what the folder holds."""
        digest = hashlib.sha1()
        for path in files_of(folder):
            digest.update(f"{path}\0{sha256_of(folder / path)}\0".encode())
        return digest.hexdigest()


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sha256_of(path: Path) -> str:
    state = path.stat()
    return _sha256(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _sha256(path: str, _size: int, _mtime: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_oid_of(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin") or path.stat().st_size >= LARGE_BYTES


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, name: str, port: int) -> None:
        self.hub = hub
        self.name = name
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _answer(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        path = unquote(parts.path)
        with hub.served.lock:
            had_token = "authorization" in {name.lower() for name in self.headers}
            hub.served.requests.append((self.server.name, self.command, self.path, had_token))
        if any(part in self.path for part in hub.faults.silent):
            time.sleep(5.0)
        if self.server.name == "storage":
            return self._storage(path, parts.query)
        pieces = path.strip("/").split("/")
        if pieces == ["api", "whoami-v2"]:
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._error(401, "")
            return self._json({"name": "alice", "type": "user", "auth": {"accessToken": {"role": "read"}}})
        if pieces[:2] == ["api", "models"] and (name := hub.present_name("/".join(pieces[2:4]))):
            return self._head(307, {"Location": self.path.replace("/".join(pieces[2:4]), name), "Content-Length": "0"})
        if pieces[:2] == ["api", "models"] and len(pieces) >= 4:
            return self._metadata("/".join(pieces[2:4]), pieces[4:], parse_qs(parts.query))
        if len(pieces) >= 5 and pieces[2] == "resolve":
            return self._resolve("/".join(pieces[:2]), pieces[3], "/".join(pieces[4:]))
        return self._error(404, "RepoNotFound")

    def _allowed(self, repo: str, *, file: bool) -> bool:
        hub = self.server.hub
        authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if repo in hub.private and not authorized:
            self._error(401, "RepoNotFound")
            return False
        if repo in hub.gated and file and not authorized:
            self._error(401 if "Authorization" not in self.headers else 403, "GatedRepo")
            return False
        return True

    def _metadata(self, repo: str, rest: list[str], query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        time.sleep(hub.faults.metadata_delay_s)
        if self._faulty("metadata"):
            return None
        if not self._allowed(repo, file=bool(rest[:1] == ["tree"])):
            return None
        revision = rest[1] if len(rest) > 1 else "main"
        if not (hub.folder / repo).is_dir():
            return self._error(404, "RepoNotFound")
        folder = hub.repo_folder(repo, revision)
        if folder is None:
            return self._error(404, "RevisionNotFound")
        commit = hub.commit(folder)
        if rest[:1] == ["tree"]:
            return self._tree(folder, commit, repo, int(query.get("cursor", ["0"])[0]))
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files_of(folder)]
        if query.get("blobs"):
            for sibling in siblings:
                entry = self._entry(folder, sibling["rfilename"])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0})

    def _tree(self, folder: Path, commit: str, repo: str, cursor: int) -> None:
        hub = self.server.hub
        entries = [self._entry(folder, name) for name in files_of(folder)]
        entries += [{"type": "file", "path": name, "size": 3, "oid": "0" * 40} for name in hub.faults.extra_names]
        page = entries[cursor : cursor + hub.faults.tree_page]
        headers = {}
        if cursor + len(page) < len(entries):
            following = f"{hub.url}/api/models/{repo}/tree/{commit}?recursive=true&cursor={cursor + len(page)}"
            headers["Link"] = f'<{following}>; rel="next"'
        self._json(page, headers)

    def _entry(self, folder: Path, name: str) -> dict[str, Any]:
        path = folder / name
        size = self.server.hub.faults.stated_size.get(name, path.stat().st_size)
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
        if is_large(path):
            entry["lfs"] = {"oid": sha256_of(path), "size": size, "pointerSize": 134}
        else:
            entry["oid"] = git_oid_of(path)
        return entry

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        hub = self.server.hub
        if not self._allowed(repo, file=True):
            return None
        folder = hub.repo_folder(repo, revision)
        if folder is None:
            return self._error(404, "RevisionNotFound" if (hub.folder / repo).is_dir() else "RepoNotFound")
        path = folder / name
        if name not in files_of(folder):
            return self._error(404, "EntryNotFound")
        commit = hub.commit(folder)
        if not is_large(path):
            return self._bytes(path, {"X-Repo-Commit": commit, "ETag": f'"{git_oid_of(path)}"'})
        size = path.stat().st_size
        self._head(
            302,
            {
                "Location": f"{hub.storage_url}/{repo}/{revision}/{quote(name)}?{SIGNATURE}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha256_of(path)}"',
                "X-Linked-Size": str(size),
                "ETag": f'"{sha256_of(path)}"',
                "Content-Length": "0",
            },
        )

    def _storage(self, path: str, query: str) -> None:
        org, name, revision, *rest = path.strip("/").split("/")
        folder = self.server.hub.repo_folder(f"{org}/{name}", revision)
        if folder is None or query != SIGNATURE:
            return self._error(403, "SignatureDoesNotMatch")
        return self._bytes(folder / "/".join(rest), {"ETag": '"x"'})

    def _bytes(self, path: Path, headers: dict[str, str]) -> None:
        hub, name = self.server.hub, path.name
        if self._faulty(name):
            return
        size = path.stat().st_size
        start, end, status = 0, size, 200
        wanted = self.headers.get("Range")
        if wanted and not hub.faults.ignore_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(size, int(last) + 1 if last else size), 206
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self._head(status, headers | {"Content-Length": str(end - start), "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        cuts = hub.faults.cut_after.get(name)
        if cuts:
            limit = cuts.pop(0)
            if start + limit < end:
                self._send(path, start, start + limit)
                self.close_connection = True
                self.connection.close()
                return
        if name in hub.faults.wrong_first:
            self._send(hub.take_wrong(name, size, end - start), start, end)
            return
        flip = name in hub.faults.flip_byte or name in hub.faults.flip_byte_once
        if flip and end == size and end > start:
            hub.faults.flip_byte_once.discard(name)
            self._send(path, start, end - 1)
            self.wfile.write(bytes([path.read_bytes()[-1] ^ 1]))
            self._count(name, 1)
            return
        self._send(path, start, end)

    def _send(self, path: Path, start: int, end: int) -> None:
        hub = self.server.hub
        self.wfile.flush()
        if path.name in hub.faults.held:
            hub.faults.held[path.name].wait(60)
        with path.open("rb") as file:
            while start < end:
                rate = hub.faults.bytes_per_s
                step = min(end - start, 64 << 10 if rate else 16 << 20)
                if rate:
                    with hub.throttle:
                        time.sleep(step / rate)
                sent = os.sendfile(self.connection.fileno(), file.fileno(), start, step)
                self._count(path.name, sent)
                start += sent

    def _count(self, name: str, size: int) -> None:
        with self.server.hub.served.lock:
            self.server.hub.served.bytes[name] += size

    def _faulty(self, name: str) -> bool:
        queued = self.server.hub.faults.status.get(name)
        if not queued:
            return False
        status, headers = queued.pop(0)
        self._head(status, headers | {"Content-Length": "0"})
        return True

    def _json(self, record: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(record).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {}))
        self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": code, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def running_hub(folder: Path, *, port: int = 0) -> Iterator[Hub]:
    """A hub over `folder` for the length of the block."""
    hub = Hub(folder, port=port)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


@contextmanager
def hub_process(folder: Path, *, bytes_per_s: float = 0.0) -> Iterator[str]:
    """A hub in a process of its own for the length of the block; yields its address."""
    command = [sys.executable, "-m", "tests.support.hub", str(folder), "--bytes-per-s", str(bytes_per_s)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent.parent, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bytes-per-s", type=float, default=0.0, help="limit over all connections")
    arguments = parser.parse_args()
    with running_hub(arguments.folder, port=arguments.port) as hub:
        hub.faults.bytes_per_s = arguments.bytes_per_s
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
