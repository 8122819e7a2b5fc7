#!/usr/bin/env python3
"""The worker over HTTP, at 1, 16 and 64 clients: the first streamed token, tokens a second, and the processor time of
the server's first process for a token. Of the vLLM engine this process is the layer before vLLM's own server.

    python scripts/bench/http_server.py [--starts 3] [--runs 3] [--tokens 32] [--write DOCUMENT]

Two comparisons, in turn, with the real SmolLM2-135M on the CPU: the text engine by `--http` against the
same worker behind the SDK's local server, which sends a stream as a whole at its end; and, if .venv-vllm is there, the
vLLM engine by `--http` against plain `vllm serve`. The rate of vLLM differs from one process to the next. So these two
are started several times, and the worker's own vLLM is asked directly, too: that difference is what the worker takes.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from modelstore.bench.race import environment
from scripts.bench.sections import write_section

CLIENTS = (1, 16, 64)
VLLM = HERE / ".venv-vllm" / "bin" / "python"
MODEL = HERE / ".cache" / "hub" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
VLLM_ARGUMENTS = ("--enforce-eager", "--max-model-len", "512")
READY_S = 600.0
VLLM_OVER_HTTP = "vLLM, `--http`"
OWN_VLLM = "its own vLLM, asked directly"
REST_S = 2.0  # vLLM's threads spin for a second after their last token, on the processors of the next round


@dataclass
class Measured:
    """What was measured of a server, by number of clients: seconds to the first token, tokens a second, and
    milliseconds of processor that its first process, without its children, took for a token."""

    first_s: dict[int, list[float]] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)
    processor_ms: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """A server that runs. `socket`: the socket file that it is asked at, instead of its port."""

    label: str
    process_id: int
    url: str
    path: str
    ready_path: str
    socket: str | None = None

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

    async def run(self, clients: int, tokens: int, measured: Measured) -> None:
        """One round: all clients at once, when the other servers have come to rest."""
        await asyncio.sleep(REST_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        transport = httpx.AsyncHTTPTransport(uds=self.socket, limits=limits)
        async with httpx.AsyncClient(base_url=self.url, timeout=READY_S, transport=transport) as client:
            began, processor_s = time.monotonic(), _processor_s(self.process_id)
            firsts = await asyncio.gather(*(self._first(client, number, tokens) for number in range(clients)))
            took, processor_s = time.monotonic() - began, _processor_s(self.process_id) - processor_s
        measured.first_s.setdefault(clients, []).append(statistics.median(firsts))
        measured.rates.setdefault(clients, []).append(clients * tokens / took)
        measured.processor_ms.setdefault(clients, []).append(1000 * processor_s / (clients * tokens))

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
def running(command: Sequence[str], env: Mapping[str, str], path: str, ready: str, label: str) -> Iterator[Server]:
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


def measure(servers: Sequence[Server], runs: int, tokens: int, results: Mapping[str, Measured]) -> None:
    """Rounds of all servers in turn, for each number of clients; `results`: of each server by its label."""
    for clients in CLIENTS:
        for server in servers:
            asyncio.run(server.run(clients, tokens, Measured()))  # what is compiled or allocated once is not counted
        for number in range(runs * 3 if clients == 1 else runs):  # one client's round is short
            for server in servers if number % 2 == 0 else reversed(servers):
                measured = results[server.label]
                asyncio.run(server.run(clients, tokens, measured))
                print(f"{server.label}, {clients} clients: {measured.rates[clients][-1]:.1f} tokens/s", file=sys.stderr)


def table(results: Mapping[str, Measured]) -> list[str]:
    """A row for each server and number of clients, with the ratio of the first one's rate to it, round by round."""
    lines = ["| server | clients | first token, s | tokens a second | the first / this one | its process, ms a token |"]
    lines += ["|---|---|---|---|---|---|"]
    first = next(iter(results.values()))
    for clients in CLIENTS:
        for label, measured in results.items():
            first_s, rate, processor_ms = (
                statistics.median(figures[clients])
                for figures in (measured.first_s, measured.rates, measured.processor_ms)
            )
            ratios = [ours / other for ours, other in zip(first.rates[clients], measured.rates[clients], strict=True)]
            ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
            row = (label, clients, f"{first_s:.3f}", f"{rate:.1f}", "" if measured is first else ratio)
            lines.append(f"| {' | '.join(map(str, row))} | {processor_ms:.2f} |")
    return [*lines, ""]


def own_vllm(worker: Server, folder: Path) -> Server:
    """The vLLM of a worker whose temporary folder is `folder`, asked without the worker."""
    (socket_file,) = folder.glob("modelstore-server-*/socket")
    return replace(worker, label=OWN_VLLM, socket=str(socket_file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="of each of the servers with vLLM")
    parser.add_argument("--runs", type=int, default=3, help="rounds with each start")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT")
    options = parser.parse_args()
    subprocess.run([sys.executable, "scripts/dev/smollm2.py", str(MODEL)], cwd=HERE, check=True, capture_output=True)
    lines = [
        f"Measured by `scripts/bench/http_server.py --starts {options.starts} --runs {options.runs} "
        f"--tokens {options.tokens}`: SmolLM2-135M, all clients at once, {options.tokens} tokens each, medians; "
        "clients and server share the processors.",
        f"{environment(HERE)}.",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="bench-http-") as folder:
        env = {
            "TMPDIR": folder,
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
        of_text, of_vllm = env | {"ENGINE": "text"}, env | {"ENGINE": "vllm"}
        pairs = [
            {
                "text, `--http`": partial(running, http, of_text, chat, "/ping"),
                "text, the SDK's local server": partial(running, local, of_text, "/runsync", "/"),
            },
            {
                VLLM_OVER_HTTP: partial(running, http, of_vllm, chat, "/ping"),
                "plain `vllm serve`": partial(running, (*plain, "--dtype", "float32"), env, chat, "/health"),
            },
        ]
        for pair in pairs if VLLM.exists() else pairs[:1]:
            results: dict[str, Measured] = {label: Measured() for label in pair}
            for start in range(options.starts if VLLM_OVER_HTTP in pair else 1):
                with ExitStack() as stack:
                    labels = list(pair) if start % 2 == 0 else list(reversed(pair))
                    servers = {label: stack.enter_context(pair[label](label)) for label in labels}
                    if (of_worker := servers.get(VLLM_OVER_HTTP)) is not None:
                        servers[OWN_VLLM] = own_vllm(of_worker, Path(folder))
                        results.setdefault(OWN_VLLM, Measured())
                    measure(list(servers.values()), options.runs, options.tokens, results)
            lines += table(results)
    text = "\n".join(lines)
    print(text)
    if options.write is not None:
        write_section(options.write, "bench/http_server.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
