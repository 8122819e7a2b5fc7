#!/usr/bin/env python3
"""Send a job to an endpoint: wait for it, poll it, or stream it.

    RUNPOD_API_KEY=… python scripts/invoke.py ENDPOINT_ID "Once upon a time" [--stream | --poll] [--max-tokens 50]

What may be sent twice without harm is tried again, with growing pauses of random length (urllib3 does it): whatever
asks for a status; and a job only where it was not taken: no connection, 429, 503. RUNPOD_ENDPOINT_BASE_URL names
another server, as for RunPod's SDK.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_PAUSES = {"backoff_factor": 0.3, "backoff_max": 10, "backoff_jitter": 0.3, "respect_retry_after_header": True}
_ASKING = Retry(total=6, status_forcelist=(429, 500, 502, 503, 504), allowed_methods={"GET"}, **_PAUSES)
_SENDING = Retry(total=6, read=0, status_forcelist=(429, 503), allowed_methods={"POST"}, **_PAUSES)


class Endpoint:
    """One endpoint. Raises requests.RequestException where it cannot be reached, RuntimeError for a job that failed."""

    def __init__(self, endpoint_id: str, api_key: str, base_url: str = "https://api.runpod.ai/v2") -> None:
        self._url = f"{base_url.rstrip('/')}/{endpoint_id}"
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {api_key}"

    def run_sync(self, job_input: dict[str, Any]) -> Any:
        """The output, once it is there."""
        return self._finished(self._post("runsync", {"input": job_input}))

    def run(self, job_input: dict[str, Any]) -> str:
        """The id of a job that is begun."""
        return str(self._post("run", {"input": job_input})["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        """A job as it is now: `status`, and `output` or `error` once that is one of FINAL."""
        return self._get(f"status/{job_id}")

    def wait(self, job_id: str, *, every_s: float = 1.0) -> Any:
        """The output of a job, asked for again and again."""
        while (job := self.status(job_id))["status"] not in FINAL:
            print(f"{job_id}: {job['status']}", file=sys.stderr)
            time.sleep(every_s)
        return self._finished(job)

    def stream(self, job_id: str) -> Iterator[Any]:
        """The chunks of a job, as they come."""
        while True:
            found = self._get(f"stream/{job_id}")
            for chunk in found["stream"]:
                yield chunk["output"]
            if found["status"] in FINAL and not found["stream"]:
                self._finished(self._get(f"status/{job_id}"))
                return

    def cancel(self, job_id: str) -> None:
        """End a job that nobody wants any more."""
        self._post(f"cancel/{job_id}", {})

    def _finished(self, job: dict[str, Any]) -> Any:
        if job["status"] not in FINAL:
            return self.wait(job["id"])
        if job["status"] != "COMPLETED":
            raise RuntimeError(job.get("error") or f"{job['status']}: the job was not finished")
        return job.get("output")

    def _get(self, path: str) -> dict[str, Any]:
        return self._request("GET", path, None, _ASKING)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._request("POST", path, body, _SENDING)

    def _request(self, method: str, path: str, body: Any, retry: Retry) -> dict[str, Any]:
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))
        response = self._session.request(method, f"{self._url}/{path}", json=body, timeout=(10, 120))
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.7)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--stream", action="store_true", help="print the text as it comes")
    how.add_argument("--poll", action="store_true", help="begin the job, then ask for its status")
    options = parser.parse_args()
    key = os.environ.get("RUNPOD_API_KEY")
    if not key:
        print("error: RUNPOD_API_KEY is not set: make a key in RunPod's settings", file=sys.stderr)
        return 2
    endpoint = Endpoint(options.endpoint, key, os.environ.get("RUNPOD_ENDPOINT_BASE_URL") or "https://api.runpod.ai/v2")
    job = {"prompt": options.prompt, "max_tokens": options.max_tokens, "temperature": options.temperature}
    try:
        if options.stream:
            for chunk in endpoint.stream(endpoint.run({**job, "stream": True})):
                print(chunk["token"], end="", flush=True)
            print()
        else:
            output = endpoint.wait(endpoint.run(job)) if options.poll else endpoint.run_sync(job)
            print(json.dumps(output, indent=2, ensure_ascii=False))
    except (requests.RequestException, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
