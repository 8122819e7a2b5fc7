"""An endpoint as it shall be, compared with what is deployed: see deploy.py, whose options these are."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import UsageError
from modelstore.reference import parse_reference
from modelstore.settings import Settings, ineffective
from scripts.endpoint import endpoint_of_name, serves_http
from scripts.runpod_api import Api

_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD)(_ID)?$")
CUDA = "13.0"  # of the torch in our image: on a host with an older driver it sees no GPU
SERVE_HTTP = "python -m handler --http"
_VOLUMES_UNKNOWN = "the data centers follow from the volumes"


@dataclass(frozen=True, slots=True)
class Preset:
    """How an endpoint scales; times in seconds."""

    workers_min: int
    workers_max: int
    idle_timeout: int
    execution_timeout: int
    flashboot: bool = False


PRESETS = {
    "dev": Preset(0, 1, 30, 300),
    "latency": Preset(2, 10, 120, 60),
    "cost": Preset(0, 5, 60, 300, flashboot=True),
}


def desired_endpoint(
    options: argparse.Namespace, before: Mapping[str, Any], data_centers: Sequence[str]
) -> dict[str, Any]:
    """The endpoint as it shall be: as `before`, empty if there is none, with the changes of the command line. A preset
    gives the values of a new endpoint, and of an old one if it is named."""
    is_new = not before
    preset = PRESETS[options.preset or "cost"] if is_new or options.preset else None
    is_http = options.http or serves_http(before)
    changes: dict[str, Any] = {
        "image": options.image,
        "disk": options.disk,
        "args": options.args,
        "env": environment(options, before),
        "registry": options.registry,
        "networkVolumes": options.volume,
        "dataCenterIds": list(data_centers) if options.volume or options.locations else None,
        "timeout": _milliseconds(options.execution_timeout, preset),
        "flashboot": _flashboot(options, preset),
        "scaling": _scaling(options, is_http=is_http, is_new=is_new),
    }
    if is_new:
        usual = {"disk": 20, "type": "LOAD_BALANCER" if is_http else "QUEUE"}
        usual |= {"args": SERVE_HTTP} if is_http else {}
        changes = usual | _given(changes)
    endpoint = {**before, "name": before.get("name", options.name), **_given(changes)}
    if gpu := _gpu(options, before.get("gpu") or {}, is_new=is_new):
        if before.get("cpu"):
            raise UsageError(f"the endpoint {options.name} runs on CPUs, for good: leave the options for GPUs out")
        endpoint["gpu"] = gpu
    endpoint["workers"] = _workers(options, preset, before.get("workers") or {})
    if not is_http and endpoint["scaling"]["type"] == "REQUEST_COUNT":  # such an endpoint has none
        if options.idle_timeout is not None:
            raise UsageError("--idle-timeout has no effect with --request-count: leave it out, or use --queue-delay")
        endpoint["workers"].pop("idleTimeout", None)
    if (is_http and {"PORT", "PORT_HEALTH"} & endpoint["env"].keys()) or (is_http and is_new):
        _open_ports(endpoint)
    return endpoint


def _open_ports(endpoint: dict[str, Any]) -> None:
    """Let the load balancer reach the ports that the worker's environment names. Its own default is 80 for both."""
    env = endpoint["env"]
    if "PORT" in env:
        env.setdefault("PORT_HEALTH", env["PORT"])
    ports = dict.fromkeys((env.get("PORT", "80"), env.get("PORT_HEALTH", "80")))
    endpoint["ports"] = [f"{port}/http" for port in ports]


def check_options(options: argparse.Namespace, before: Mapping[str, Any]) -> None:
    """Raise UsageError for what is wrong with the options, before anything is made."""
    check_environment(environment(options, before))
    desired_endpoint(options, before, ())


def environment(options: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the workers, with the changes of the command line."""
    env = dict(before.get("env") or {})
    env |= {"MODEL_ID": str(parse_reference(options.model))} if options.model else {}
    env |= dict(options.env)
    if missing := [name for name in options.unset if name not in env and before]:
        raise UsageError(f"--unset {missing[0]}: the endpoint has no such variable")
    return {name: value for name, value in sorted(env.items()) if name not in options.unset}


def check_environment(env: Mapping[str, str]) -> None:
    """Print a warning for each variable that has no effect. Raises ModelStoreError if no worker could start."""
    if Settings.from_env(env, root=Path("/volume")).model is None:
        raise UsageError("the environment has no MODEL_ID then, and no worker could start: name one with --model")
    for line in ineffective(env):
        print(f"warning: {line}", file=sys.stderr)


def _milliseconds(seconds: int | None, preset: Preset | None) -> int | None:
    seconds = preset.execution_timeout if seconds is None and preset is not None else seconds
    return None if seconds is None else seconds * 1000


def _flashboot(options: argparse.Namespace, preset: Preset | None) -> str | None:
    if options.flashboot or (preset is not None and preset.flashboot):
        return "FLASHBOOT"
    return "OFF" if preset is not None else None


def _scaling(options: argparse.Namespace, *, is_http: bool, is_new: bool) -> dict[str, Any] | None:
    if options.queue_delay is not None:
        if is_http:
            raise UsageError("--queue-delay is of an endpoint with a queue: use --request-count for one with --http")
        return {"type": "QUEUE_DELAY", "queueDelay": options.queue_delay}
    if options.request_count is not None:
        return {"type": "REQUEST_COUNT", "requestCount": options.request_count}
    if not is_new:
        return None
    return {"type": "REQUEST_COUNT", "requestCount": 4} if is_http else {"type": "QUEUE_DELAY", "queueDelay": 4}


def _gpu(options: argparse.Namespace, before: Mapping[str, Any], *, is_new: bool) -> dict[str, Any]:
    usual = {"pools": ["ADA_24", "AMPERE_24"], "count": 1, "minCudaVersion": CUDA} if is_new else {}
    changes = {
        "pools": options.gpu,
        "excludedTypes": options.exclude_gpu,
        "count": options.gpu_count,
        "minCudaVersion": options.cuda,
        "allowedCudaVersions": [] if options.cuda and before.get("allowedCudaVersions") else None,
    }
    return {**usual, **before, **_given(changes)}


def _workers(options: argparse.Namespace, preset: Preset | None, before: Mapping[str, Any]) -> dict[str, Any]:
    usual = {}
    if preset is not None:
        usual = {"min": preset.workers_min, "max": preset.workers_max, "idleTimeout": preset.idle_timeout}
    changes = {"min": options.workers_min, "max": options.workers_max, "idleTimeout": options.idle_timeout}
    workers = {**before, **usual, **_given(changes)}
    if workers["min"] > workers["max"]:
        raise UsageError(f"--workers-min {workers['min']} is more than --workers-max {workers['max']}")
    return workers


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Plan:
    """The endpoint as it shall be, and as it is now; empty if there is none."""

    endpoint: Mapping[str, Any]
    before: Mapping[str, Any]

    def body(self) -> dict[str, Any]:
        """The body of the request that makes the one of the other; empty if nothing changes. `gpu` and `workers` go
        whole where a part of them changes, for a list of pools alone would clear the excluded types."""
        changed = {name: value for name, value in self.endpoint.items() if value != self.before.get(name)}
        if "gpu" in changed and self.before:
            gpu, gpu_before = self.endpoint["gpu"], self.before.get("gpu") or {}
            parts = {name: value for name, value in gpu.items() if value != gpu_before.get(name)}
            selection = {name: gpu[name] for name in ("pools", "excludedTypes") if name in gpu}
            changed["gpu"] = parts | (selection if parts.keys() & selection.keys() else {})
        return changed

    def differences(self) -> Iterator[str]:
        """A line for each value that changes: `+` for a new one, `-` for one that goes; secrets are not shown."""
        before, after = _flat(self.before), _flat(self.endpoint)
        for name in sorted({*before, *after}):
            old, new = ("…" if value and _is_secret(name) else value for value in (before.get(name), after.get(name)))
            if before.get(name) == after.get(name):
                continue
            if old is None:
                yield f"+ {name}: {new}"
            elif new is None:
                yield f"- {name}: {old}"
            else:
                yield f"  {name}: {old} -> {new}"

    def as_json(self) -> dict[str, Any]:
        """The plan without its secrets."""
        body = self.body()
        if "env" in body:
            body["env"] = {name: "…" if _is_secret(name) else value for name, value in body["env"].items()}
        return {"endpoint": ("update" if self.before else "create", body), "changes": list(self.differences())}


def _flat(endpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The values by the names that a person knows them by."""
    values: dict[str, Any] = {}
    for name, value in _given(endpoint).items():
        if name == "env":
            values |= {f"environment {key}": text for key, text in value.items()}
        elif isinstance(value, dict):
            values |= {f"endpoint {name} {part}": each for part, each in _given(value).items()}
        elif name not in ("id", "createdAt", "requestUrls"):
            values[f"endpoint {name}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return values


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.upper()) is not None


def make_plan(options: argparse.Namespace, api: Api | None) -> Plan:
    """The plan, given what there is on the account, which `api` tells; without it, for a new endpoint.

    Raises UsageError if a new endpoint lacks something.
    """
    before = endpoint_of_name(api, options.name) if api is not None else {}
    needed = {
        "--image": options.image,
        "--model": options.model or {"MODEL_ID", "MODEL_NAME"} & dict(options.env).keys(),
    }
    needed |= {"--volume": options.volume}
    missing = [name for name, value in needed.items() if not value and not before]
    if missing and api is None:
        print(f"a new endpoint also needs {', '.join(missing)}", file=sys.stderr)
    elif missing:
        raise UsageError(f"there is no endpoint {options.name} yet, and a new one needs {', '.join(missing)}")
    if before and options.http and not serves_http(before):
        raise UsageError(f"the endpoint {options.name} has a queue, for good: deploy under another name with --http")
    return Plan(desired_endpoint(options, before, _data_centers(options, before, api)), before)


def _data_centers(options: argparse.Namespace, before: Mapping[str, Any], api: Api | None) -> list[str]:
    """The data centers in which workers may run: those of the volumes, unless --locations names some of them."""
    named = options.volume or (before.get("networkVolumes") if options.locations else None)
    if api is None or not named:
        if named and not options.locations:
            print(_VOLUMES_UNKNOWN, file=sys.stderr)
        return list(options.locations or ())
    volumes = {each["id"]: each for each in api.get("/v2/network-volumes")["networkVolumes"]}
    unknown = [volume for volume in named if volume not in volumes]
    if unknown:
        known = ", ".join(f"{each['id']} ({each['name']}, {each['dataCenter']})" for each in volumes.values())
        raise UsageError(f"there is no volume {unknown[0]}; the account has {known or 'none: make one first'}")
    places = list(dict.fromkeys(volumes[volume]["dataCenter"] for volume in named))
    for place in options.locations or ():
        if place not in places:
            raise UsageError(f"--locations {place} has none of the volumes: they lie in {', '.join(places)}")
    return list(options.locations or places)
