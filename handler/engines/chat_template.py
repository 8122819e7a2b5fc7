"""Chat templates, rendered in an isolated process.

A chat template is a program that the model's repository brings. transformers renders it in a sandbox that keeps it from
files and from Python's internals, but neither from looping for ever, nor from a product of huge numbers that holds the
interpreter's lock, nor from filling the memory. The process here can be killed: it has no token and no environment, is
`nobody`'s instead of root's, has no network if the kernel gives it a namespace, may neither open sockets nor start
programs, and has a limit of memory, and an alarm that ends it after `LIMIT_S`.

    in      {"template": str, "messages": [{…}], "variables": {…}, "options": {…}}    one line each
    out     {"text": str} or {"error": str}

`options` are arguments of transformers' `render_jinja_template`, such as `add_generation_prompt` and `tools`.

The engine uses `Renderer`. The process imports transformers without torch: 60 MB and 0.7 s.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from handler.errors import TemplateError, TemplateTimeout
from modelstore import isolation
from modelstore.environment import bare_environment
from modelstore.units import one_line

LIMIT_S = 10.0
_START_S = 60.0  # the process imports transformers from a disk that may be cold
_MEMORY_BYTES = 2 << 30
# Modules that templates use, and that Python or transformers would import only at their first use
_WARM_UP = "{{ strftime_now('%d %b %Y') }}{{ [1] | tojson }}{% for _ in [1] %}{% break %}{% endfor %}"
_MAX_ERROR_CHARACTERS = 500
_OPENING: Mapping[str, Any] = {"add_generation_prompt": True}
_SAMPLE = "20361845"  # a content, to see what a template makes of it
_ESCAPED = 12  # characters of JSON for one beyond Unicode's first plane


class Renderer:
    """Renders chat templates, one at a time. Started when it is first used, or by `start`; call `close` at the end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._reads_parts: dict[str, bool] = {}  # by template

    def start(self) -> None:
        """Have the process do its imports, without waiting for it."""
        with self._lock:
            self._running()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        options: Mapping[str, Any] = _OPENING,
    ) -> str:
        """The text that the template makes of a conversation; by default with the opening of the assistant's answer.

        Raises TemplateError, and TemplateTimeout after `LIMIT_S`.
        """
        parts = {"template": template, "messages": messages, "variables": variables, "options": options}
        request = json.dumps(parts, default=str)
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            watchdog = threading.Timer(LIMIT_S + _START_S, process.kill)
            watchdog.daemon = True
            watchdog.start()
            try:
                process.stdin.write(f"{request}\n")
                process.stdin.flush()
                line = process.stdout.readline(_ESCAPED * _most_characters(request))
            except OSError:
                line = ""
            finally:
                watchdog.cancel()
            if not line.endswith("\n"):
                process.kill()
                code = self._ended(process)
                late = code in (-signal.SIGALRM, -signal.SIGKILL)
                reason = f"it did not end within {LIMIT_S:g} s" if late else f"its process ended with {code}"
                raise TemplateTimeout(reason)
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        text: str = answer["text"]
        return text

    def reads_parts(self, template: str, variables: Mapping[str, Any]) -> bool:
        """Whether the template reads the content of a message as a list of parts alone. It would leave out a content
        that is a string, without an error. Raises TemplateTimeout."""
        if template not in self._reads_parts:

            def shows(content: object) -> bool:
                try:
                    return _SAMPLE in self.render(template, [{"role": "user", "content": content}], variables)
                except TemplateError:
                    return False

            self._reads_parts[template] = not shows(_SAMPLE) and shows([{"type": "text", "text": _SAMPLE}])
        return self._reads_parts[template]

    def close(self) -> None:
        """Return when the process has ended."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._ended(self._process)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            if self._process is not None:
                self._ended(self._process)
            self._process = subprocess.Popen(
                isolation.command("handler.engines.chat_template", str(os.getpid())),
                env=bare_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        return self._process

    def _ended(self, process: subprocess.Popen[str]) -> int:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # the last output has no reader any more
                pipe.close()
        self._process = None
        return process.wait()


def _most_characters(request: str) -> int:
    """How long a text a template may make of a request: twice its input, and a million characters."""
    return 2 * len(request) + 1_000_000


def main(parent: str) -> int:
    """Answer requests on the standard input until it ends, or the process `parent` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's, which closes our input when it ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    isolation.leave_the_network()
    # Any thread of the worker may have started this process, and its end of our input may live on in a process that
    # the SDK has forked.
    isolation.watch_parent(int(parent))
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template(conversations=[[{"role": "user"}]], chat_template=_WARM_UP)
    isolation.leave_root()  # all is imported, so no file has to be readable any more
    isolation.forbid_all_but_computing()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # by default the alarm ends the process
        try:
            (text,), _indices = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                **request["options"],
                **request["variables"],
            )
            answer = {"text": text} if len(text) <= _most_characters(line) else {"error": "it makes too long a text"}
        except Exception as error:  # a template can raise anything
            answer = {"error": one_line(str(error) or type(error).__name__, _MAX_ERROR_CHARACTERS)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return 0
