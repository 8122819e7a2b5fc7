"""A stand-in for RunPod's REST API, version 2: the endpoints and volumes of one account.

Each request and each answer is compared with RunPod's own schema (`runpod_openapi.json`, published as 2.0.0 on 2026-08-20,
here without its prose), so a field that is none fails, whoever invents it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

READ_ONLY_KEY = "rpa_read_only"
PREFIXES = ("serverless", "network-volumes", "pods", "catalog")


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
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    quota: int = 30  # workers
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
        status = next(int(code) for code in operation["responses"] if code.startswith("2"))
        if status != 204:
            answer = operation["responses"][str(status)]["content"]["application/json"]["schema"]
            wrong = errors_of(result, answer)
            assert not wrong, (template, wrong)
        return status, result

    # Endpoints

    def _listEndpoints(self) -> Any:  # noqa: N802
        return {"endpoints": list(self.endpoints.values())}

    def _getEndpoint(self, name: str) -> Any:  # noqa: N802
        return self._known(self.endpoints, name, "endpoint")

    def _deleteEndpoint(self, name: str) -> None:  # noqa: N802
        self._known(self.endpoints, name, "endpoint")
        del self.endpoints[name]

    def _createEndpoint(self, body: Mapping[str, Any]) -> Any:  # noqa: N802
        if ("gpu" in body) == ("cpu" in body):
            raise Problem(400, "Bad Request", "exactly one of gpu and cpu must be set")
        number = f"e{len(self.requests)}"
        is_queue = body["type"] == "QUEUE"
        base = f"{self.url}/{number}"
        actions = {"run": "run", "runSync": "runsync", "purgeQueue": "purge-queue", "health": "health"}
        actions |= {name: f"{name}/{{job_id}}" for name in ("status", "stream", "cancel", "retry")}
        queue = {name: f"{base}/{action}" for name, action in actions.items()}
        http = {"base": f"https://{number}.api.runpod.ai", "health": f"https://{number}.api.runpod.ai/ping"}
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
