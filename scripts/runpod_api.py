"""RunPod's REST API, version 2: requests with a key, and errors as one line each that says what to do.

Its schema is published at https://docs.runpod.io; errors are problem details (RFC 9457).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import httpx

from modelstore.errors import AccessDenied, ModelStoreError, UsageError
from modelstore.units import one_line

_TIMEOUT_S = 30.0
_TRIES = 4
_MOST_WAIT_S = 30.0
_LINE_CHARACTERS = 500
_LOG_S = 10.0


class Unreachable(ModelStoreError):
    """RunPod does not answer, or not now."""

    exit_code = 4


class InUse(UsageError):
    """The object is not removed or changed, because something else still uses it."""


class Api:
    """The account that a key belongs to."""

    def __init__(self, key: str, base: str = "") -> None:
        """`base`: the address, by default that of RUNPOD_API_BASE_URL, as for the SDK, else RunPod's own."""
        self._client = httpx.Client(
            base_url=base or os.environ.get("RUNPOD_API_BASE_URL") or "https://api.runpod.io",
            headers={"Authorization": f"Bearer {key}"},
            timeout=_TIMEOUT_S,
        )

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def get(self, path: str) -> Any:
        """The answer to a GET. Raises ModelStoreError, as the others do."""
        return self._answer("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """The answer to a POST. If the answer is lost, the object may be there."""
        return self._answer("POST", path, body)

    def patch(self, path: str, body: Any) -> Any:
        """The answer to a PATCH."""
        return self._answer("PATCH", path, body)

    def delete(self, path: str) -> None:
        """Remove an object, unless it is gone already."""
        self._answer("DELETE", path)

    def log(self, path: str) -> Log:
        """The log at an address."""
        return Log(self._client, path)

    def _answer(self, method: str, path: str, body: Any = None) -> Any:
        for number in range(1, _TRIES + 1):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                if number == _TRIES or not _may_repeat(method, error):
                    raise Unreachable(f"RunPod cannot be reached ({type(error).__name__}): try again") from error
                wait_s = float(number)
            else:
                if method == "DELETE" and response.status_code == 404:
                    return None
                if response.status_code not in (429, 503) or number == _TRIES:
                    return _content(method, path, response)
                wait_s = _wait_s(response, number)
            time.sleep(wait_s)
        raise AssertionError("it returned, or raised")


class Log:
    """A log that is written meanwhile: server-sent events, each with an id, so that a connection that breaks loses and
    repeats nothing."""

    def __init__(self, client: httpx.Client, path: str) -> None:
        self._client = client
        self._path = path
        self._last_id = ""

    def lines(self) -> Iterator[str]:
        """The lines since the last one that was taken, as they come, for some seconds; ask again then. There are none
        if there is no log yet, or RunPod does not answer now. Raises ModelStoreError if it refuses."""
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        timeout = httpx.Timeout(_TIMEOUT_S, read=_LOG_S)
        event_id, deadline = self._last_id, time.monotonic() + _LOG_S
        try:
            with self._client.stream("GET", self._path, headers=headers, timeout=timeout) as response:
                if response.status_code in (404, 429) or response.status_code >= 500:
                    return
                if response.status_code >= 300:
                    response.read()
                    _content("GET", self._path, response)
                for text in response.iter_lines():
                    name, _colon, value = text.partition(":")
                    if name == "id":
                        event_id = value.strip()
                    elif name == "data":
                        self._last_id = event_id
                        yield one_line(_line_of(value), _LINE_CHARACTERS)
                    if time.monotonic() > deadline:
                        return
        except httpx.TransportError:
            return


def _line_of(data: str) -> str:
    """The text of an event; an event of another form as it is."""
    try:
        return str(json.loads(data)["line"])
    except (ValueError, KeyError, TypeError):
        return data.strip()


def _may_repeat(method: str, error: httpx.TransportError) -> bool:
    """Whether a request cannot have been taken, or may be taken twice."""
    return method != "POST" or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


def _wait_s(response: httpx.Response, number: int) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text) if text.isdigit() else float(number), _MOST_WAIT_S)


def _content(method: str, path: str, response: httpx.Response) -> Any:
    """What a request returns, or its error."""
    status = response.status_code
    if status < 300:
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise Unreachable(f"RunPod's answer to {method} {path} is no JSON: try again") from error
    problem = _problem(response)
    if status == 401:
        raise AccessDenied("RunPod does not know this key: make one in its settings, and set RUNPOD_API_KEY")
    if status == 403 and "quota" not in problem.lower():
        raise AccessDenied(f"the key may not do this ({method} {path}): {problem}; make one that has the permission")
    if status in (429, 503):
        raise Unreachable(f"RunPod takes no more requests now ({status}): try again later")
    if status == 409 or "in use" in problem.lower() or "attached" in problem.lower():
        raise InUse(f"RunPod refuses it ({status}): {problem}")
    if status >= 500:
        raise Unreachable(f"RunPod has failed ({status}: {problem}): try again; a second run goes on")
    advice = "; ask RunPod for a larger quota, or lower --workers-max" if "quota" in problem.lower() else ""
    raise UsageError(f"RunPod refuses it ({status}): {problem}{advice}")


def _problem(response: httpx.Response) -> str:
    """The problem's own words, in one line."""
    try:
        record = response.json()
        texts = [record["detail"], *record.get("errors", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        texts = [response.text or response.reason_phrase]
    return one_line("; ".join(map(str, texts)), _LINE_CHARACTERS)
