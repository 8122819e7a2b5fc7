#!/usr/bin/env python3
"""Create an endpoint on RunPod with its template, or bring those of that name up to date; again and again is fine.

    RUNPOD_API_KEY=… python scripts/deploy.py chat --image you/modelstore-worker --model org/name --volume VOLUME_ID \\
        --gpu ADA_24,AMPERE_24 --preset cost [--env KEY=VALUE]… [--dry-run]

--gpu: in order of preference. Presets (figures for a 7B model; each can be overridden):

    dev      0 to 1 workers,  idle 30 s,  jobs up to 300 s
    latency  2 to 10 workers, idle 120 s, jobs up to 60 s
    cost     0 to 5 workers,  idle 60 s,  jobs up to 300 s, FlashBoot
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from modelstore.errors import InvalidSetting, ModelStoreError, UsageError
from modelstore.reference import parse_reference
from modelstore.settings import FIELDS, Settings

_FIND = "query { myself { endpoints { id name templateId } podTemplates { id name } } }"


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


def graphql(value: Any) -> str:
    """A value as GraphQL writes it: as JSON, but for the names of fields and of enums."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {graphql(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(graphql(each) for each in value) + "]"
    return str(value) if isinstance(value, _Enum) else json.dumps(value)


class _Enum(str):
    """A name that GraphQL knows."""


def template_input(options: argparse.Namespace, template_id: str | None) -> dict[str, Any]:
    env = {"MODEL_ID": str(parse_reference(options.model)), **dict(options.env)}
    return {
        **({"id": template_id} if template_id else {}),
        "name": f"{options.name}-modelstore",
        "imageName": options.image,
        "dockerArgs": "",
        "containerDiskInGb": options.disk,
        "volumeInGb": 0,
        "ports": "",
        "isServerless": True,
        "readme": "",
        "env": [{"key": key, "value": value} for key, value in sorted(env.items())],
    }


def endpoint_input(options: argparse.Namespace, endpoint_id: str | None, template_id: str) -> dict[str, Any]:
    preset = PRESETS[options.preset]

    def chosen(name: str) -> int:
        given = getattr(options, name)
        return int(getattr(preset, name) if given is None else given)

    return {
        **({"id": endpoint_id} if endpoint_id else {}),
        "name": options.name,
        "templateId": template_id,
        "gpuIds": options.gpu,
        "gpuCount": options.gpu_count,
        "networkVolumeId": options.volume,
        "locations": options.locations,
        "workersMin": chosen("workers_min"),
        "workersMax": chosen("workers_max"),
        "idleTimeout": chosen("idle_timeout"),
        "executionTimeoutMs": chosen("execution_timeout") * 1000,
        "scalerType": "QUEUE_DELAY",
        "scalerValue": 4,
        **({"flashBootType": _Enum("FLASHBOOT")} if preset.flashboot or options.flashboot else {}),
    }


def deploy(options: argparse.Namespace) -> dict[str, Any]:
    """Create or update both, template first; returns what was done. Raises the SDK's errors."""
    from runpod.api.graphql import run_graphql_query

    found = run_graphql_query(_FIND)["data"]["myself"]
    template_id = _id_of(found["podTemplates"], f"{options.name}-modelstore")
    # RunPod marks what has FlashBoot by a suffix to its name.
    endpoint_id = _id_of(found["endpoints"], options.name) or _id_of(found["endpoints"], f"{options.name} -fb")
    template = template_input(options, template_id)
    query = f"mutation {{ saveTemplate(input: {graphql(template)}) {{ id }} }}"
    if not options.dry_run:
        template_id = run_graphql_query(query)["data"]["saveTemplate"]["id"]
    endpoint = endpoint_input(options, endpoint_id, template_id or "the new template's")
    query = f"mutation {{ saveEndpoint(input: {graphql(endpoint)}) {{ id }} }}"
    if not options.dry_run:
        endpoint["id"] = run_graphql_query(query)["data"]["saveEndpoint"]["id"]
    return {
        "done": not options.dry_run,
        "endpoint": ("update" if endpoint_id else "create", endpoint),
        "template": ("update" if "id" in template else "create", template),
    }


def _id_of(found: list[dict[str, Any]], name: str) -> str | None:
    ids = [str(one["id"]) for one in found if one["name"] == name]
    if len(ids) > 1:
        raise UsageError(f"there are {len(ids)} of the name {name!r}: rename or remove all but one")
    return ids[0] if ids else None


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text.partition('=')[0]!r} is not NAME=VALUE")
    return name, value


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the endpoint's")
    parser.add_argument("--image", required=True, help="as it was pushed")
    parser.add_argument("--model", required=True, help="org/name, org/name@revision or @alias")
    parser.add_argument("--volume", required=True, help="the network volume's id")
    parser.add_argument("--gpu", default="ADA_24,AMPERE_24", help="pools of GPUs, in order of preference")
    parser.add_argument("--gpu-count", type=int, default=1, help="for each worker")
    parser.add_argument("--preset", choices=PRESETS, default="cost")
    for name in ("workers-min", "workers-max", "idle-timeout", "execution-timeout"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--flashboot", action="store_true", help="also where the preset has none")
    parser.add_argument("--disk", type=int, default=20, help="GB of the container; no model goes there")
    parser.add_argument("--locations", default="", help="data centres; the volume's by default")
    parser.add_argument("--env", type=_variable, action="append", default=[], help="another setting of the worker")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    return parser.parse_args()


def main() -> int:
    options = _parsed()
    known = {field.variable for field in FIELDS}
    try:
        Settings.from_env({name: value for name, value in options.env if name in known}, root=Path("/volume"))
        if not os.environ.get("RUNPOD_API_KEY"):
            raise InvalidSetting("RUNPOD_API_KEY is not set: make a key in RunPod's settings")
        import requests
        import runpod
        from runpod.error import RunPodError

        runpod.api_key = os.environ["RUNPOD_API_KEY"]
        done = deploy(options)
    except ModelStoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (RunPodError, requests.RequestException) as error:
        print(f"error: RunPod says: {error}", file=sys.stderr)
        return 1
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    for entry in done["template"][1]["env"]:
        if any(word in entry["key"].upper() for word in secret):
            entry["value"] = "…"
    print(json.dumps(done, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
