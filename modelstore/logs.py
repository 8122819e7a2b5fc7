"""Log records that nothing quoted in them can break up, imitate or hide.

A record's message is one printable line, cut to the length that RunPod keeps. A traceback keeps its lines, each of them
indented: a line of a log that begins with a level or with `start failed:` is ours.
"""

from __future__ import annotations

import logging
import sys

from modelstore.units import one_line, printable

LINE_CHARACTERS = 3800  # RunPod cuts log lines at 4096
_TRACEBACK_LINES = 60
_LIBRARIES = ("transformers", "diffusers", "huggingface_hub", "accelerate")


class _OneLineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = one_line(self.formatMessage(_with_message(record)), LINE_CHARACTERS)
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            shown = [*lines[:5], "...", *lines[5 - _TRACEBACK_LINES :]] if len(lines) > _TRACEBACK_LINES else lines
            text += "".join(f"\n    {printable(line[:500])}" for line in shown)
        return text


def _with_message(record: logging.LogRecord) -> logging.LogRecord:
    try:
        record.message = record.getMessage()
    except Exception as error:  # arguments that do not fit the message: the record is shown all the same
        record.message = f"{record.msg} ({type(error).__name__} in its arguments)"
    return record


def log_to_stderr(level: int, form: str) -> None:
    """Have the process log to stderr in the `form` of a %-format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])


def take_library_logs() -> None:
    """Let libraries that log by a handler of their own log by ours. Call it after they are imported."""
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
