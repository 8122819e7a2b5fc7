"""A stand-in for RunPod's REST API, version 2: the endpoints, volumes and pods of one account.

Each request and each answer is compared with RunPod's own schema (`runpod_openapi.json`, published as 2.0.0 on 2026-08-20,
here without its prose), so a field that is none fails, whoever invents it.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.runpod_machines import Machines

READ_ONLY_KEY = "rpa_read_only"
PREFIXES = ("serverless", "network-volumes", "pods", "catalog")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@cache
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "runpod_openapi.json").read_text())
    return found


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, title: str, detail: str, errors: list[str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.body = {"title": title, "status": status, "detail": detail} | ({"errors": errors} if errors else {})


def errors_of(value: Any, part: Mapping[str, Any]) -> list[str]:
    """How a value differs from a schema of the document."""
    from openapi_schema_validator import OAS31Validator  # a machine with a GPU may lack it, and runs other tests

    validator = OAS31Validator({**part, "components": schema()["components"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


@dataclass
class Account:
    """What an owner has. `key` may do everything."""

    key: str
    url: str = "https://api.runpod.ai/v2"
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    volumes: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    machines: Machines | None = None  # without, nothing runs
    worker_env: Callable[[str], Mapping[str, str]] = lambda _worker: {}
    on_change: Callable[[str, str], None] = lambda _method, _path: None  # called after a change was made
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    quota: int = 30  # workers
    in_use_status: int = 409
    detach_s: float = 0.0  # for which the workers of an endpoint that was removed hold its volumes
    held_until: dict[str, float] = field(default_factory=dict)  # volumes, on the clock of time.monotonic
    refusals: list[int] = field(default_factory=list)  # statuses of the next answers

    def answer(self, method: str, path: str, body: Any, key: str) -> tuple[int, Any, str]:
        """The status, the body and its type."""
        try:
            status, answer = self._answered(method, path, body, key)
        except Problem as problem:
            if not errors_of(problem.body, {"$ref": "#/components/schemas/ErrorResponse"}):
                return problem.status, problem.body, "application/problem+json"
            raise
        return status, answer, "application/json"

    def _answered(self, method: str, path: str, body: Any, key: str) -> tuple[int, Any]:
        template, operation, names = _operation(method, path)
        self.requests.append((method, path, body))
        if self.refusals:
            status = self.refusals.pop(0)
            raise Problem(status, "Not now", "try again")
        if key not in (self.key, READ_ONLY_KEY):
            raise Problem(401, "Unauthorized", "invalid API key")
        if key == READ_ONLY_KEY and method != "GET":
            raise Problem(403, "Forbidden", "the key has no write access to serverless")
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]["schema"]
            if errors := errors_of(body, content):
                raise Problem(422, "Unprocessable Entity", "request validation failed", errors)
        act: Callable[..., Any] = getattr(self, f"_{operation['operationId']}")
        result = act(*names, *([body] if "requestBody" in operation else []))
        if method != "GET":
            self.on_change(method, path)
        status = next(int(code) for code in operation["responses"] if code.startswith("2"))
        if status != 204:
            answer = operation["responses"][str(status)]["content"]["application/json"]["schema"]
            wrong = errors_of(result, answer)
            assert not wrong, (template, wrong)
        return status, result

    def log(self, path: str, key: str) -> str:
        """The name of the container whose log lies at this address. Raises Problem."""
        _operation("GET", path)
        name = path.split("/")[-2]
        if key != self.key:
            raise Problem(401, "Unauthorized", "invalid API key")
        if self.machines is None or not self.machines.lines(name):
            raise Problem(404, "Not Found", f"{name} has no log")
        return name

    def job_arrived(self, endpoint_id: str) -> None:
        """Start a worker of an endpoint, if none runs."""
        endpoint = self.endpoints.get(endpoint_id)
        if endpoint is not None and self.machines is not None:
            worker = f"{endpoint_id}-w1"
            env = {**endpoint["env"], **self.worker_env(worker)}
            self.machines.start(worker, endpoint["args"], env, *endpoint["networkVolumes"][:1])

    # Pods

    def _listPods(self) -> Any:  # noqa: N802
        return {"pods": [self._pod(name) for name in self.pods]}

    def _getPod(self, name: str) -> Any:  # noqa: N802
        self._known(self.pods, name, "pod")
        return self._pod(name)

    def _deletePod(self, name: str) -> None:  # noqa: N802
        self._known(self.pods, name, "pod")
        del self.pods[name]
        if self.machines is not None:
            self.machines.stop(name)

    def _createPod(self, body: Mapping[str, Any]) -> Any:  # noqa: N802
        if ("gpu" in body) == ("cpu" in body):
            raise Problem(400, "Bad Request", "exactly one of gpu and cpu must be set")
        (mount,) = body["mounts"]["network"]
        volume = self._known(self.volumes, mount["volumeId"], "network volume")
        if body.get("dataCenterIds", []) != [volume["dataCenter"]]:
            raise Problem(400, "Bad Request", f"the volume is in {volume['dataCenter']}")
        name = f"p{len(self.requests)}"
        config = {key: body[key] for key in ("name", "image", "args", "disk", "env", "mounts")}
        self.pods[name] = {
            **config,
            "id": name,
            "actions": ["stop", "restart", "terminate"],
            "cpu": {**body["cpu"], "memory": 2 * body["cpu"]["vcpuCount"]},
            "ports": [],
            "registry": None,
            "cloud": "SECURE",
            "dataCenterId": volume["dataCenter"],
            "cudaVersion": None,
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": 0.12,
            "locked": False,
            "runtime": None,
            "createdAt": "2026-06-01T12:00:00Z",
            "startedAt": None,
            "globalNetworking": {"enabled": False},
        }
        if self.machines is not None:
            self.machines.start(name, body["args"], body["env"], mount["volumeId"])
        return self._pod(name)

    def _pod(self, name: str) -> dict[str, Any]:
        return {**self.pods[name], "status": self.machines.status(name) if self.machines else "PROVISIONING"}

    # Endpoints

    def _listEndpoints(self) -> Any:  # noqa: N802
        return {"endpoints": list(self.endpoints.values())}

    def _getEndpoint(self, name: str) -> Any:  # noqa: N802
        return self._known(self.endpoints, name, "endpoint")

    def _deleteEndpoint(self, name: str) -> None:  # noqa: N802
        endpoint = self._known(self.endpoints, name, "endpoint")
        self.held_until |= dict.fromkeys(endpoint["networkVolumes"], time.monotonic() + self.detach_s)
        del self.endpoints[name]
        if self.machines is not None:
            self.machines.stop(f"{name}-w1")

    def _listEndpointWorkers(self, name: str) -> Any:  # noqa: N802
        self._known(self.endpoints, name, "endpoint")
        worker = f"{name}-w1"
        runs = self.machines is not None and self.machines.status(worker) == "RUNNING"
        states = dict.fromkeys(("running", "idle", "initializing", "throttled", "unhealthy"), 0)
        workers = [{"id": worker, "status": "INITIALIZING", "gpuCount": 1, "isStale": False}] if runs else []
        return {"workers": workers, "summary": states | {"initializing": len(workers), "total": len(workers)}}

    def _createEndpoint(self, body: Mapping[str, Any]) -> Any:  # noqa: N802
        if ("gpu" in body) == ("cpu" in body):
            raise Problem(400, "Bad Request", "exactly one of gpu and cpu must be set")
        number = f"e{len(self.requests)}"
        is_queue = body["type"] == "QUEUE"
        base = f"{self.url}/{number}"
        actions = {"run": "run", "runSync": "runsync", "purgeQueue": "purge-queue", "health": "health"}
        actions |= {name: f"{name}/{{job_id}}" for name in ("status", "stream", "cancel", "retry")}
        queue = {name: f"{base}/{action}" for name, action in actions.items()}
        base_url = f"https://{number}.api.runpod.ai" if self.machines is None else f"http://127.0.0.1:{free_port()}"
        http = {"base": base_url, "health": f"{base_url}/ping"}
        usual = {"min": 0, "max": 3, "idleTimeout": 10}
        gpu = {"count": 1, "allowedCudaVersions": [], "minCudaVersion": None} | dict(body.get("gpu", {}))
        endpoint = {
            "args": "",
            "disk": 20,
            "env": {},
            "ports": [],
            "registry": None,
            "timeout": 300_000,
            "flashboot": "OFF",
            "dataCenterIds": [],
            "networkVolumes": [],
            **body,
            "id": number,
            "createdAt": "2026-06-01T12:00:00Z",
            "requestUrls": queue if is_queue else http,
            "workers": usual | dict(body.get("workers", {})),
            "gpu": gpu,
        }
        self._check(endpoint)
        self.endpoints[number] = endpoint
        if not is_queue and self.machines is not None:
            env = {**endpoint["env"], "PORT": base_url.rpartition(":")[2]}
            self.machines.start(f"{number}-w1", endpoint["args"], env, endpoint["networkVolumes"][0])
        return self._shown(endpoint)

    @staticmethod
    def _shown(endpoint: dict[str, Any]) -> dict[str, Any]:
        if endpoint["type"] == "QUEUE" and endpoint["scaling"]["type"] == "REQUEST_COUNT":
            endpoint["workers"].pop("idleTimeout", None)
        return endpoint

    def _updateEndpoint(self, name: str, body: Mapping[str, Any]) -> Any:  # noqa: N802
        before = self._known(self.endpoints, name, "endpoint")
        gpu = dict(body.get("gpu", {}))
        cleared = {"excludedTypes"} if "pools" in gpu and "excludedTypes" not in gpu else set()
        kept = {part: value for part, value in (before["gpu"] or {}).items() if part not in cleared}
        workers = before["workers"] | dict(body.get("workers", {}))
        endpoint = {**before, **body, "gpu": kept | gpu or None, "workers": workers}
        if "gpu" in body and before.get("cpu"):
            raise Problem(400, "Bad Request", "the endpoint runs on CPUs")
        self._check(endpoint)
        self.endpoints[name] = endpoint
        return self._shown(endpoint)

    def _check(self, endpoint: dict[str, Any]) -> None:
        if endpoint["workers"]["max"] > self.quota:
            raise Problem(403, "Forbidden", f"the account's quota is {self.quota} workers")
        if endpoint["gpu"] and endpoint["gpu"]["allowedCudaVersions"] and endpoint["gpu"]["minCudaVersion"]:
            raise Problem(400, "Bad Request", "allowedCudaVersions and minCudaVersion exclude each other")
        if endpoint["type"] == "LOAD_BALANCER" and endpoint["scaling"]["type"] != "REQUEST_COUNT":
            raise Problem(400, "Bad Request", "a load balancer scales on REQUEST_COUNT")
        for volume in endpoint["networkVolumes"]:
            place = self._known(self.volumes, volume, "network volume")["dataCenter"]
            if endpoint["dataCenterIds"] and place not in endpoint["dataCenterIds"]:
                raise Problem(400, "Bad Request", f"the volume {volume} is in {place}")

    # Volumes

    def _listNetworkVolumes(self) -> Any:  # noqa: N802
        return {"networkVolumes": list(self.volumes.values())}

    def _createNetworkVolume(self, body: Mapping[str, Any]) -> Any:  # noqa: N802
        volume = {"type": "STANDARD", **body, "id": f"v{len(self.requests)}"}
        self.volumes[volume["id"]] = volume
        return volume

    def _updateNetworkVolume(self, name: str, body: Mapping[str, Any]) -> Any:  # noqa: N802
        volume = self._known(self.volumes, name, "network volume")
        if body.get("size", volume["size"]) < volume["size"]:
            raise Problem(400, "Bad Request", "a volume cannot be made smaller")
        volume |= body
        return volume

    def _deleteNetworkVolume(self, name: str) -> None:  # noqa: N802
        self._known(self.volumes, name, "network volume")
        is_used = any(name in endpoint["networkVolumes"] for endpoint in self.endpoints.values())
        if is_used or time.monotonic() < self.held_until.get(name, 0.0):
            raise Problem(self.in_use_status, "Conflict", f"the volume {name} is in use")
        del self.volumes[name]
        if self.machines is not None:
            self.machines.remove_volume(name)

    @staticmethod
    def _listDataCenters() -> Any:  # noqa: N802
        types = {"EU-RO-1": ["STANDARD"], "US-KS-2": ["STANDARD"], "US-NO-1": []}
        return {
            "dataCenters": [
                {
                    "id": name,
                    "name": name,
                    "region": "EUROPE" if name.startswith("EU") else "NORTH_AMERICA",
                    "networkVolumeTypes": kinds,
                    "compliance": [],
                    "globalNetwork": True,
                }
                for name, kinds in types.items()
            ]
        }

    @staticmethod
    def _known(records: dict[str, dict[str, Any]], name: str, kind: str) -> dict[str, Any]:
        if name not in records:
            raise Problem(404, "Not Found", f"{kind} {name} not found")
        return records[name]


def _operation(method: str, path: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    for template, operations in schema()["paths"].items():
        match = re.fullmatch(re.sub(r"\{\w+\}", "([^/]+)", template), path)
        if match is not None and method.lower() in operations:
            return template, operations[method.lower()], match.groups()
    raise Problem(404, "Not Found", f"{method} {path} is not known")
