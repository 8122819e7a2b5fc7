"""RunPod's REST API, version 2: requests with a key, and errors as one line each that says what to do.

Its schema is published at https://docs.runpod.io; errors are problem details (RFC 9457).
"""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from modelstore.errors import AccessDenied, ModelStoreError, UsageError
from modelstore.units import one_line

_TIMEOUT_S = 30.0
_TRIES = 4
_MOST_WAIT_S = 30.0
_LINE_CHARACTERS = 500


class Unreachable(ModelStoreError):
    """RunPod does not answer, or not now."""

    exit_code = 4


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
        """Remove an object."""
        self._answer("DELETE", path)

    def _answer(self, method: str, path: str, body: Any = None) -> Any:
        for number in range(1, _TRIES + 1):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                if number == _TRIES or not _may_repeat(method, error):
                    raise Unreachable(f"RunPod cannot be reached ({type(error).__name__}): try again") from error
                wait_s = float(number)
            else:
                if response.status_code not in (429, 503) or number == _TRIES:
                    return _content(method, path, response)
                wait_s = _wait_s(response, number)
            time.sleep(wait_s)
        raise AssertionError("it returned, or raised")


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
