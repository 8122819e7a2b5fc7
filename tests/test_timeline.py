"""The record of a start."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from modelstore.timeline import Span, Timeline


def test_times_count_from_the_birth_of_the_process() -> None:
    code = "import time; time.sleep(0.5); from modelstore.timeline import Timeline; print(Timeline().now())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - began + 0.02


def test_a_span_that_fails_is_recorded_too() -> None:
    timeline = Timeline()

    def fail() -> None:
        with timeline.span("read") as span:
            span.size_bytes = 10
            raise OSError

    with pytest.raises(OSError):
        fail()
    (span,) = timeline.spans
    assert (span.name, span.size_bytes) == ("read", 10)
    assert span.end >= span.start


def test_the_record_has_the_contracts_fields_on_one_line() -> None:
    timeline = Timeline(worker="w", model="org/name", commit="c", dtype="float16", outcome="hit", reason="why")
    timeline.add(Span("read", 1.0, 3.0, 1000))
    timeline.mark("ready")
    line = timeline.log_line()
    assert "\n" not in line
    record = json.loads(line)["timeline"]
    assert next(span for span in record["spans"] if span["name"] == "read") == {
        "name": "read",
        "start": 1.0,
        "end": 3.0,
        "bytes": 1000,
        "bytes_per_s": 500.0,
    }
    assert {"worker", "model", "commit", "dtype", "outcome", "reason", "pid"} < record.keys()


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_waterfall_fits_its_width_and_keeps_the_order(width: int) -> None:
    timeline = Timeline()
    timeline.add(Span("read", 0.0, 1.0))
    timeline.add(Span("import", 0.0, 4.0))
    timeline.add(Span("ready", 4.0, 4.0))
    lines = timeline.waterfall(width=width).splitlines()
    assert [line.split()[0] for line in lines] == ["read", "import", "ready"]
    assert all(len(line) <= width for line in lines)
    assert lines[1].count("█") == pytest.approx(4 * lines[0].count("█"), abs=3)


def test_an_empty_timeline_draws_nothing() -> None:
    assert Timeline().waterfall() == ""
