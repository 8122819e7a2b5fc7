#!/usr/bin/env python3
"""The worker over HTTP, at 1, 16 and 64 clients: the first streamed token, tokens a second, and the processor time of
the server's first process for a token. Of the vLLM engine this process is the layer before vLLM's own server.

    python scripts/bench/http_server.py [--runs 3] [--tokens 32] [--write DOCUMENT]

Two comparisons, in pairs, with the real SmolLM2-135M on the CPU: the text engine by `--http` against the
same worker behind the SDK's local server, which sends a stream as a whole at its end; and, if .venv-vllm is there, the
vLLM engine by `--http` against plain `vllm serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.race import environment  # noqa: E402
from scripts.bench.sections import write_section  # noqa: E402

CLIENTS = (1, 16, 64)
VLLM = HERE / ".venv-vllm" / "bin" / "python"
MODEL = HERE / ".cache" / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
VLLM_ARGUMENTS = ("--enforce-eager", "--max-model-len", "512")
READY_S = 600.0
REST_S = 2.0  # vLLM's threads spin for a second after their last token, on the processors of the next round


@dataclass
class Server:
    """A server, and what was measured of it: seconds to the first token, tokens a second, and milliseconds of processor
    that its first process, without its children, took for a token, by number of clients."""

    label: str
    process_id: int
    url: str
    path: str
    ready_path: str
    first_s: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)
    processor_ms: dict[int, list[float]] = field(default_factory=dict)

    def body(self, number: int, tokens: int) -> dict[str, Any]:
        """The request of one client."""
        text = f"Write a list of {number + 3} animals."
        asked = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        asked["ignore_eos"] = True
        return {"input": asked} if self.path == "/runsync" else asked

    async def run(self, clients: int, tokens: int) -> None:
        """One round: all clients at once, when the other server has come to rest."""
        await asyncio.sleep(REST_S)
        async with httpx.AsyncClient(base_url=self.url, timeout=READY_S, trust_env=False) as client:
            began, processor_s = time.monotonic(), _processor_s(self.process_id)
            firsts = await asyncio.gather(*(self._first(client, number, tokens) for number in range(clients)))
            took, processor_s = time.monotonic() - began, _processor_s(self.process_id) - processor_s
        self.first_s.setdefault(clients, []).append(statistics.median(firsts))
        self.rates.setdefault(clients, []).append(clients * tokens / took)
        self.processor_ms.setdefault(clients, []).append(1000 * processor_s / (clients * tokens))

    async def _first(self, client: httpx.AsyncClient, number: int, tokens: int) -> float:
        began, first, text = time.monotonic(), 0.0, ""
        async with client.stream("POST", self.path, json=self.body(number, tokens)) as response:
            async for part in response.aiter_text():
                text += part
                if not first and ('"content":' in part or '"token":' in part):
                    first = time.monotonic() - began
        if response.status_code != 200 or not first:
            raise SystemExit(f"{self.label} answered {response.status_code}: {text[:300]}")
        return first


@contextmanager
def running(label: str, command: Sequence[str], env: Mapping[str, str], path: str, ready: str) -> Iterator[Server]:
    """A server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [each.replace("PORT", str(port)) for each in command], env=os.environ | env, stdout=log, stderr=log, cwd=HERE
    )
    server = Server(label, process.pid, f"http://127.0.0.1:{port}", path, ready)
    try:
        until = time.monotonic() + READY_S
        while not _is_ready(server):
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise SystemExit(f"{label} is not ready: {log.read()[-2000:].decode(errors='replace')}")
            time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _processor_s(process_id: int) -> float:
    """The seconds of processor that a process has taken, without its children."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _is_ready(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}{server.ready_path}", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def measured(servers: Sequence[Server], runs: int, tokens: int) -> list[str]:
    """A row for each server and number of clients, with the ratio of its rate to the first one's."""
    for clients in CLIENTS:
        for server in servers:
            asyncio.run(server.run(clients, tokens))  # what is compiled or allocated once is not counted
            for figures in (server.first_s, server.rates, server.processor_ms):
                figures.pop(clients)
        for number in range(runs * 3 if clients == 1 else runs):  # one client's round is short
            for server in servers if number % 2 == 0 else reversed(servers):
                asyncio.run(server.run(clients, tokens))
                print(f"{server.label}, {clients} clients: {server.rates[clients][-1]:.0f} tokens/s", file=sys.stderr)
    lines = ["| server | clients | first token, s | tokens a second | of the other | its process, ms a token |"]
    lines += ["|---|---|---|---|---|---|"]
    other = servers[-1]
    for clients in CLIENTS:
        for server in servers:
            pairs = zip(server.rates[clients], other.rates[clients], strict=True)
            ratio = "" if server is other else f"{statistics.median(ours / theirs for ours, theirs in pairs):.3f}"
            first, rate, processor_ms = (
                statistics.median(figures[clients]) for figures in (server.first_s, server.rates, server.processor_ms)
            )
            row = (server.label, clients, f"{first:.3f}", f"{rate:.0f}", ratio, f"{processor_ms:.2f}")
            lines.append(f"| {' | '.join(map(str, row))} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT")
    options = parser.parse_args()
    subprocess.run([sys.executable, "scripts/dev/smollm2.py", str(MODEL)], cwd=HERE, check=True, capture_output=True)
    lines = [
        f"Measured by `scripts/bench/http_server.py --runs {options.runs} --tokens {options.tokens}`: SmolLM2-135M, "
        f"all clients at once, {options.tokens} tokens each, medians; clients and server share the processors.",
        f"{environment(HERE)}.",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="bench-http-") as folder:
        env = {
            "MODELSTORE_ROOT": f"{folder}/modelstore",
            "MODEL_ID": f"file://{MODEL}",
            "MODEL_DTYPE": "float32",  # the fastest on a processor
            "MAX_CONCURRENCY": str(max(CLIENTS)),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "MODELSTORE_VLLM_PYTHON": str(VLLM),
            "MODELSTORE_VLLM_ARGS": " ".join(VLLM_ARGUMENTS),
        }
        worker = (sys.executable, "-m", "handler")
        http = (*worker, "--http", "--port", "PORT")
        local = (*worker, "--rp_serve_api", "--rp_api_port", "PORT", "--rp_log_level", "ERROR")
        plain = (str(VLLM), "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--port", "PORT", *VLLM_ARGUMENTS)
        chat = "/v1/chat/completions"
        pairs = [
            (
                running("text, `--http`", http, env | {"ENGINE": "text"}, chat, "/ping"),
                running("text, the SDK's local server", local, env | {"ENGINE": "text"}, "/runsync", "/"),
            ),
            (
                running("vLLM, `--http`", http, env | {"ENGINE": "vllm"}, chat, "/ping"),
                running("plain `vllm serve`", (*plain, "--dtype", "float32"), env, chat, "/health"),
            ),
        ]
        for pair in pairs if VLLM.exists() else pairs[:1]:
            with ExitStack() as stack:
                servers = [stack.enter_context(server) for server in pair]
                lines += [*measured(servers, options.runs, options.tokens), ""]
    text = "\n".join(lines)
    print(text)
    if options.write is not None:
        write_section(options.write, "bench/http_server.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
