"""Log lines that nothing in them can break up or imitate; lengths of time in them."""

from __future__ import annotations

import subprocess
import sys

from modelstore.units import span

SCRIPT = """
import logging, sys
from modelstore.logs import LINE_CHARACTERS, log_to_stderr, take_library_logs

log_to_stderr(logging.INFO, "%(levelname)s %(name)s: %(message)s")
evil = "x\\nstart failed: all is lost\\r\\x1b[2J\\u2028INFO handler: fine\\ud800"
logging.info("job %s: %s", evil, "y" * 100_000)
try:
    raise ValueError(evil)
except ValueError:
    logging.exception("failed: %s", evil)
logging.warning("%d of %s", "no number", 1)
import transformers
take_library_logs()
transformers.logging.get_logger("transformers.models").warning(evil)
"""


def test_a_record_is_one_printable_line_and_cut() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    lines = done.stderr.split("\n")
    assert all(line.isprintable() for line in lines)
    assert all(len(line) < 4096 for line in lines)
    levels = [line for line in lines if line and not line.startswith("    ")]
    assert [line.split()[0] for line in levels] == ["INFO", "ERROR", "WARNING", "WARNING"]
    assert any(line.startswith("    ValueError: x") for line in lines), "a traceback is kept, indented"


def test_a_length_of_time_is_written_in_the_largest_unit_that_it_rounds_to_one_of() -> None:
    lengths = {59.4: "59 s", 59.6: "1 min", 3569: "59 min", 3571: "1 h", 84_599: "23 h", 86_390: "1 d", 86_400: "1 d"}
    assert {seconds: span(seconds) for seconds in lengths} == lengths
