"""A first job for an endpoint: the states of its workers and the log of the first one meanwhile, and the answer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx
import requests

from modelstore.errors import ModelStoreError
from modelstore.units import one_line
from scripts.endpoint import FIRST_JOB, serves_http, url_of
from scripts.invoke import FINAL, Endpoint
from scripts.runpod_api import Api, Unreachable

_EVERY_S = 1.0


class NoAnswer(ModelStoreError):
    """No answer to what was asked for, or not in time."""

    exit_code = 4


def tell(line: str) -> None:
    """Print a line beside the result."""
    print(line, file=sys.stderr, flush=True)


def first_answer(api: Api, endpoint: Mapping[str, Any], key: str, wait_s: float) -> Any:
    """Send one job, and show the workers' states and the first worker's log until it is answered. Raises NoAnswer and
    Unreachable."""
    deadline = time.monotonic() + wait_s
    workers = _Workers(api, endpoint, key)
    try:
        if serves_http(endpoint):
            return _answer_over_http(url_of(endpoint), endpoint, key, deadline, workers.look)
        return _answer_of_queue(url_of(endpoint), key, deadline, workers.look)
    finally:
        workers.close()


class _Workers:
    """The workers of an endpoint as they come up: each change of state is told, and the log of the first is shown."""

    def __init__(self, api: Api, endpoint: Mapping[str, Any], key: str) -> None:
        self._api = api
        self._path = f"/v2/serverless/{endpoint['id']}/workers"
        self._logs = Api(key)
        self._states: dict[str, str] = {}
        self._is_closed = threading.Event()

    def look(self) -> None:
        """Ask for the workers, and tell what has changed. An error is told: the job is what counts."""
        try:
            workers = self._api.get(self._path)["workers"]
        except ModelStoreError as error:
            tell(str(error))
            return
        for worker in workers:
            name, state = worker["id"], worker["status"]
            if self._states.get(name) != state:
                tell(f"worker {name} is {state.lower()}")
            if not self._states:
                threading.Thread(target=self._show_log, args=(name,), daemon=True).start()
            self._states[name] = state

    def close(self) -> None:
        """Show no more."""
        self._is_closed.set()

    def _show_log(self, name: str) -> None:
        log = self._logs.log(f"{self._path}/{name}/logs")
        while not self._is_closed.wait(_EVERY_S):
            try:
                for line in log.lines():
                    if self._is_closed.is_set():
                        break
                    tell(f"worker {name}: {line}")
            except ModelStoreError as error:  # the job is what counts
                tell(f"worker {name}: no log ({error})")
                break
        self._logs.close()


def _answer_of_queue(url: str, key: str, deadline: float, look: Callable[[], None]) -> Any:
    base, _, endpoint_id = url.rpartition("/")
    endpoint = Endpoint(endpoint_id, key, base)
    job_id = ""
    try:
        job_id = endpoint.run(FIRST_JOB)
        while (job := endpoint.status(job_id))["status"] not in FINAL:
            look()
            if time.monotonic() > deadline:
                raise NoAnswer(
                    f"the first job was not answered in time ({job['status']}): see the log above; run again"
                )
            time.sleep(_EVERY_S)
    except (NoAnswer, KeyboardInterrupt):
        if job_id:  # else a worker would still be started for it
            with suppress(requests.RequestException):
                endpoint.cancel(job_id)
        raise
    except requests.HTTPError as error:
        raise NoAnswer(
            f"the endpoint refuses the job ({error.response.status_code}): use a key that may run jobs"
        ) from error
    except requests.RequestException as error:
        raise Unreachable(f"the endpoint cannot be reached ({type(error).__name__}): run this again") from error
    if job["status"] != "COMPLETED":
        raise NoAnswer(f"the first job has failed: {job.get('error') or job['status']}; see the log above")
    return job.get("output")


def _answer_over_http(
    url: str, endpoint: Mapping[str, Any], key: str, deadline: float, look: Callable[[], None]
) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    headers |= {"X-API-Key": own} if (own := endpoint["env"].get("MODELSTORE_API_KEY")) else {}
    state = ""
    with httpx.Client(base_url=url, headers=headers, timeout=330) as client:
        while time.monotonic() < deadline:
            look()
            try:
                response = client.get("/ping")
                if response.status_code == 200:
                    response = client.post("/generate", json=FIRST_JOB)
                    if response.status_code == 200:
                        return response.json()
                # RunPod answers 400 itself while there is no worker.
                state = one_line(f"{response.status_code} {response.text}", 200)
                if response.status_code in (401, 403):
                    raise NoAnswer(f"the first request was refused: {state}")
            except (httpx.TransportError, ValueError) as error:
                state = type(error).__name__
            time.sleep(_EVERY_S)
    raise NoAnswer(f"no worker has answered in time ({state}): see the log above; run this again")
