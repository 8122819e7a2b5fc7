"""An endpoint of RunPod as its REST API has it: found by its name, created or updated, and how it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from modelstore.errors import UsageError
from scripts.runpod_api import Api

FIRST_JOB = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def endpoint_of_name(api: Api, name: str) -> Mapping[str, Any]:
    """The endpoint of this name; empty if there is none. RunPod adds a suffix to the name of one with FlashBoot."""
    endpoints = api.get("/v2/serverless")["endpoints"]
    for text in (name, f"{name} -fb"):
        named = [each for each in endpoints if each["name"] == text]
        if len(named) > 1:
            raise UsageError(f"there are {len(named)} endpoints of the name {text!r}: rename or remove all but one")
        if named:
            return dict(named[0])
    return {}


def create_or_update(api: Api, before: Mapping[str, Any], body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Create an endpoint, or update `before`, which has all but what `body` changes; returns it as it is then."""
    if not before:
        return api.post("/v2/serverless", body)
    return api.patch(f"/v2/serverless/{before['id']}", body) if body else before


def serves_http(endpoint: Mapping[str, Any]) -> bool:
    """Whether an existing endpoint has no queue."""
    return endpoint.get("type") == "LOAD_BALANCER" or "base" in _urls(endpoint)


def url_of(endpoint: Mapping[str, Any]) -> str:
    """The address under which its routes lie."""
    if serves_http(endpoint):
        return str(_urls(endpoint).get("base") or f"https://{endpoint['id']}.api.runpod.ai")
    return str(_urls(endpoint).get("runSync") or f"https://api.runpod.ai/v2/{endpoint['id']}").removesuffix("/runsync")


def _urls(endpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    return endpoint.get("requestUrls") or {}


def curl_of(endpoint: Mapping[str, Any]) -> str:
    """A command line that sends it a first job."""
    is_http = serves_http(endpoint)
    body = FIRST_JOB if is_http else {"input": FIRST_JOB}
    own_key = '-H "X-API-Key: $MODELSTORE_API_KEY" ' if is_http and "MODELSTORE_API_KEY" in endpoint["env"] else ""
    return (
        f"curl -s {url_of(endpoint)}/{'generate' if is_http else 'runsync'} "
        f"-H \"Authorization: Bearer $RUNPOD_API_KEY\" {own_key}-H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )
