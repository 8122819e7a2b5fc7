"""The check of a container that runs here by itself, as the image's HEALTHCHECK: `python -m handler.health`.

Its exit code is 0 if the worker beside it is ready: one that serves HTTP says so at its port for questions of health;
one that takes jobs from a queue has no port, and only has to run.
"""

from __future__ import annotations

import http.client
import sys
from collections.abc import Sequence
from pathlib import Path

from handler.listening import Address
from modelstore.settings import Settings

_ANSWER_S = 5.0
_MODULE = ["-m", "handler"]


def worker_arguments(proc: Path = Path("/proc")) -> Sequence[str] | None:
    """The arguments of the worker that runs in this container; None if there is none."""
    for path in sorted(proc.glob("[0-9]*/cmdline")):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:  # it has just ended, or is another user's
            continue
        if words[1:3] == _MODULE:
            return words[3:]
    return None


def problem(arguments: Sequence[str] | None, settings: Settings) -> str:
    """Why the worker with these arguments is not well; empty if it is."""
    if arguments is None:
        return "no worker runs here"
    if "--http" not in arguments:
        return ""
    address = Address.of(arguments, settings)
    connection = http.client.HTTPConnection(address.host, address.health_port, timeout=_ANSWER_S)
    try:
        connection.request("GET", settings.health_path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"no answer from port {address.health_port}: {error}"
    finally:
        connection.close()
    return {200: "", 204: "the worker is starting"}.get(status, f"the worker answers {status}")


def main() -> int:
    reason = problem(worker_arguments(), Settings.from_env())
    print(reason or "ready")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
