#!/usr/bin/env python3
"""Create an endpoint on RunPod with its template, or bring those of that name up to date; again and again is fine.

    RUNPOD_API_KEY=… python scripts/deploy.py chat --image you/modelstore-worker --model org/name --volume VOLUME_ID \\
        --gpu ADA_24,AMPERE_24 --preset cost [--env KEY=VALUE]… [--dry-run]
    RUNPOD_API_KEY=… python scripts/deploy.py chat --model org/other [--env KEY=VALUE]… [--unset KEY]…

A second run changes what it names, and nothing else; it prints the differences. --gpu: in order of preference. Presets
(figures for a 7B model; each can be overridden):

    dev      0 to 1 workers,  idle 30 s,  jobs up to 300 s
    latency  2 to 10 workers, idle 120 s, jobs up to 60 s
    cost     0 to 5 workers,  idle 60 s,  jobs up to 300 s, FlashBoot
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from modelstore.errors import InvalidSetting, ModelStoreError, UsageError
from modelstore.reference import parse_reference
from modelstore.settings import Settings, ineffective

_ENDPOINT = (
    "id name templateId gpuIds gpuCount networkVolumeId locations workersMin workersMax idleTimeout executionTimeoutMs "
    "scalerType scalerValue flashBootType allowedCudaVersions minCudaVersion"
)
_TEMPLATE = (
    "id name imageName dockerArgs containerDiskInGb containerRegistryAuthId volumeInGb ports isServerless readme "
    "env { key value }"
)
_FIND = f"query {{ myself {{ endpoints {{ {_ENDPOINT} }} podTemplates {{ {_TEMPLATE} }} }} }}"
_NEW_TEMPLATE = {"dockerArgs": "", "containerDiskInGb": 20, "volumeInGb": 0, "ports": "", "readme": ""}
_NEW_ENDPOINT = {
    "gpuIds": "ADA_24,AMPERE_24", "gpuCount": 1, "locations": "", "scalerType": "QUEUE_DELAY", "scalerValue": 4,
}  # fmt: skip
_UNKNOWN: Mapping[str, Sequence[Mapping[str, Any]]] = {"endpoints": (), "podTemplates": ()}
_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD)(_ID)?$")
_AS_NEW = "whether the endpoint is there is not known; this is the plan for a new one"


@dataclass(frozen=True, slots=True)
class Preset:
    """How an endpoint scales; times in seconds."""

    workers_min: int
    workers_max: int
    idle_timeout: int
    execution_timeout: int
    flashboot: bool = False

    def as_input(self) -> dict[str, Any]:
        """The values as the API names them."""
        return {
            "workersMin": self.workers_min,
            "workersMax": self.workers_max,
            "idleTimeout": self.idle_timeout,
            "executionTimeoutMs": self.execution_timeout * 1000,
            "flashBootType": "FLASHBOOT" if self.flashboot else "OFF",
        }


PRESETS = {
    "dev": Preset(0, 1, 30, 300),
    "latency": Preset(2, 10, 120, 60),
    "cost": Preset(0, 5, 60, 300, flashboot=True),
}


def graphql(value: Any) -> str:
    """A value as GraphQL writes it: as JSON, but for the names of fields and of enums."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {graphql(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(graphql(each) for each in value) + "]"
    return str(value) if isinstance(value, _Enum) else json.dumps(value)


class _Enum(str):
    """A name that GraphQL knows."""


def template_input(options: argparse.Namespace, before: Mapping[str, Any]) -> dict[str, Any]:
    """The template to save: that of `before`, empty if there is none, with the changes of the command line."""
    env = {entry["key"]: entry["value"] for entry in before.get("env") or ()}
    env |= {"MODEL_ID": str(parse_reference(options.model))} if options.model else {}
    env |= dict(options.env)
    if missing := [name for name in options.unset if name not in env and before]:
        raise UsageError(f"--unset {missing[0]}: the template has no such variable")
    changes = {
        "name": before.get("name", f"{options.name}-modelstore"),
        "imageName": options.image,
        "containerDiskInGb": options.disk,
        "isServerless": True,
        "env": [{"key": key, "value": value} for key, value in sorted(env.items()) if key not in options.unset],
    }
    return _merged(_NEW_TEMPLATE, before, changes)


def endpoint_input(options: argparse.Namespace, before: Mapping[str, Any], template_id: str) -> dict[str, Any]:
    """The same for the endpoint. A preset gives the values of a new endpoint, and of an old one if it is named."""
    preset = PRESETS[options.preset or "cost"].as_input()
    flashboot = {"flashBootType": "FLASHBOOT"} if options.flashboot else {}
    changes = {
        "name": before.get("name", options.name),
        "templateId": template_id,
        "gpuIds": options.gpu,
        "gpuCount": options.gpu_count,
        "networkVolumeId": options.volume,
        "locations": options.locations,
        "workersMin": options.workers_min,
        "workersMax": options.workers_max,
        "idleTimeout": options.idle_timeout,
        "executionTimeoutMs": options.execution_timeout and options.execution_timeout * 1000,
    }
    merged = _merged(
        _NEW_ENDPOINT | preset, before, {**(preset if options.preset else {}), **_given(changes), **flashboot}
    )
    return {name: _Enum(value) if name == "flashBootType" else value for name, value in merged.items()}


def _merged(new: Mapping[str, Any], before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """What stands there already stays, if the command line does not name it; what stands nowhere is as in `new`."""
    return {**new, **_given(before), **_given(changes)}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Plan:
    """The template and the endpoint to save, and what there is now; empty if there is none."""

    template: Mapping[str, Any]
    template_before: Mapping[str, Any]
    endpoint: Mapping[str, Any]
    endpoint_before: Mapping[str, Any]

    def differences(self) -> Iterator[str]:
        """A line for each value that changes: `+` for a new one, `-` for one that goes; secrets are not shown."""
        before = {**_flat("template", self.template_before), **_flat("endpoint", self.endpoint_before)}
        after = {**_flat("template", self.template), **_flat("endpoint", self.endpoint)}
        for name in sorted({*before, *after}):
            old, new = ("…" if value and _is_secret(name) else value for value in (before.get(name), after.get(name)))
            if before.get(name) == after.get(name) or (old is None and new in ("", 0, False)):
                continue
            yield (
                f"+ {name}: {new}"
                if old is None
                else f"- {name}: {old}"
                if new is None
                else f"  {name}: {old} -> {new}"
            )

    def as_json(self) -> dict[str, Any]:
        """The plan without its secrets."""
        env = [{**entry, "value": "…"} if _is_secret(entry["key"]) else dict(entry) for entry in self.template["env"]]
        return {
            "endpoint": ("update" if self.endpoint_before else "create", dict(self.endpoint)),
            "template": ("update" if self.template_before else "create", {**self.template, "env": env}),
            "changes": list(self.differences()),
        }


def _flat(label: str, record: Mapping[str, Any]) -> dict[str, Any]:
    values = {f"{label} {name}": value for name, value in _given(record).items() if name not in ("env", "id")}
    return values | {f"environment {entry['key']}": entry["value"] for entry in record.get("env") or ()}


def _is_secret(name: str) -> bool:
    return _SECRET.search(name.upper()) is not None


def make_plan(options: argparse.Namespace, present: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plan:
    """The plan, given the endpoints and templates that exist. Raises UsageError if a new endpoint lacks something."""
    # RunPod marks what has FlashBoot by a suffix to its name.
    endpoint = _of_name(present["endpoints"], options.name) or _of_name(present["endpoints"], f"{options.name} -fb")
    own = [each for each in present["podTemplates"] if each["id"] == endpoint.get("templateId")]
    template = own[0] if own else _of_name(present["podTemplates"], f"{options.name}-modelstore")
    names_a_model = {"MODEL_ID", "MODEL_NAME"} & dict(options.env).keys()
    needed = {"--image": template, "--model": template or names_a_model, "--volume": endpoint}
    missing = [name for name, before in needed.items() if not before and not getattr(options, name[2:])]
    if missing and present is _UNKNOWN:
        print(f"a new endpoint also needs {', '.join(missing)}", file=sys.stderr)
    elif missing:
        raise UsageError(f"there is no endpoint {options.name} yet, and a new one needs {', '.join(missing)}")
    return Plan(
        template=template_input(options, template),
        template_before=template,
        endpoint=endpoint_input(options, endpoint, str(template.get("id", "the new template's"))),
        endpoint_before=endpoint,
    )


def save(plan: Plan) -> str:
    """Create or update both, template first; returns the endpoint's id. Raises the SDK's errors."""
    from runpod.api.graphql import run_graphql_query

    query = f"mutation {{ saveTemplate(input: {graphql(plan.template)}) {{ id }} }}"
    template_id = run_graphql_query(query)["data"]["saveTemplate"]["id"]
    endpoint = {**plan.endpoint, "templateId": template_id}
    query = f"mutation {{ saveEndpoint(input: {graphql(endpoint)}) {{ id }} }}"
    return str(run_graphql_query(query)["data"]["saveEndpoint"]["id"])


def _present(options: argparse.Namespace) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The endpoints and templates of this account; for a dry run none if they cannot be asked for."""
    import requests
    import runpod
    from runpod.api.graphql import run_graphql_query

    if not os.environ.get("RUNPOD_API_KEY"):
        if options.dry_run:
            print(f"RUNPOD_API_KEY is not set: {_AS_NEW}", file=sys.stderr)
            return _UNKNOWN
        raise InvalidSetting("RUNPOD_API_KEY is not set: make a key in RunPod's settings")
    runpod.api_key = os.environ["RUNPOD_API_KEY"]
    try:
        present: Mapping[str, Sequence[Mapping[str, Any]]] = run_graphql_query(_FIND)["data"]["myself"]
    except (requests.ConnectionError, requests.Timeout) as error:
        if not options.dry_run:
            raise
        print(f"RunPod cannot be reached ({type(error).__name__}): {_AS_NEW}", file=sys.stderr)
        return _UNKNOWN
    return present


def _of_name(records: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The record of this name; empty if there is none."""
    named = [record for record in records if record["name"] == name]
    if len(named) > 1:
        raise UsageError(f"there are {len(named)} of the name {name!r}: rename or remove all but one")
    return named[0] if named else {}


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text.partition('=')[0]!r} is not NAME=VALUE")
    return name, value


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the endpoint's name")
    parser.add_argument("--image", help="the image, as it was pushed")
    parser.add_argument("--model", help="org/name, org/name@revision or @alias")
    parser.add_argument("--volume", help="the network volume's id")
    parser.add_argument("--gpu", help="pools of GPUs, in order of preference; ADA_24,AMPERE_24 for a new endpoint")
    parser.add_argument("--gpu-count", type=int, help="for each worker; 1 for a new endpoint")
    parser.add_argument("--preset", choices=PRESETS, help="cost for a new endpoint")
    for name in ("workers-min", "workers-max", "idle-timeout", "execution-timeout"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--flashboot", action="store_true", help="FlashBoot, also if the preset has none")
    parser.add_argument("--disk", type=int, help="GB of the container, 20 for a new endpoint; no model goes there")
    parser.add_argument("--locations", help="datacenters; the volume's by default")
    parser.add_argument(
        "--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker"
    )
    parser.add_argument("--unset", action="append", default=[], metavar="NAME", help="remove a setting of the worker")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and do nothing; needs no key")
    return parser.parse_args()


def main() -> int:
    options = _parsed()
    try:
        import requests
        from runpod.error import RunPodError

        plan = make_plan(options, _present(options))
        env = {entry["key"]: entry["value"] for entry in plan.template["env"]}
        if Settings.from_env(env, root=Path("/volume")).model is None and plan.template_before:
            raise UsageError("the environment has no MODEL_ID then, and no worker could start: name one with --model")
        for line in ineffective(env):
            print(f"warning: {line}", file=sys.stderr)
        for line in list(plan.differences()) or ["nothing changes"]:
            print(line, file=sys.stderr)
        record = {"done": not options.dry_run, **plan.as_json()}
        if not options.dry_run:
            endpoint_id = save(plan)
            record |= {"id": endpoint_id, "url": _url(endpoint_id)}
    except ModelStoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (RunPodError, requests.RequestException) as error:
        print(f"error: RunPod says: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=2, ensure_ascii=False))
    if not options.dry_run:
        print(f"the endpoint is {record['url']}; a first job:\n{_curl(record['url'])}", file=sys.stderr)
    return 0


def _url(endpoint_id: str) -> str:
    import runpod

    return f"{runpod.endpoint_url_base}/{endpoint_id}"


def _curl(url: str) -> str:
    job = json.dumps({"input": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}})
    return (
        f"curl -s {url}/runsync -H \"Authorization: Bearer $RUNPOD_API_KEY\" -H 'Content-Type: application/json' "
        f"-d '{job}'"
    )


if __name__ == "__main__":
    sys.exit(main())
