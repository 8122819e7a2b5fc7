"""The simulation of a fleet: shares that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.dev.fleet_sim import Fleet, Spans, first_run, scale_up, spans_of, swap

ALONE = Spans(before_s=1, import_s=4, after_s=2, read_per_s=1000)


def test_one_worker_takes_what_is_longer_and_the_rest() -> None:
    assert scale_up(1, 2000, ALONE, Fleet(1000, 1)) == [1 + 4 + 2], "the read of 2 s is hidden"
    assert scale_up(1, 9000, ALONE, Fleet(1000, 1)) == [1 + 9 + 2]


def test_workers_share_a_volume_evenly_and_none_reads_faster_than_alone() -> None:
    assert scale_up(4, 9000, ALONE, Fleet(1000, 1)) == pytest.approx([1 + 36 + 2] * 4)
    assert scale_up(4, 9000, ALONE, Fleet(8000, 1)) == pytest.approx([1 + 9 + 2] * 4)
    assert swap(4, 9000, ALONE, Fleet(1000, 1)) == pytest.approx([36] * 4)


def test_the_first_run_is_one_download_and_then_reads() -> None:
    first, *others = first_run(3, 9000, ALONE, Fleet(1000, 500))
    assert first == pytest.approx(1 + 18 + 2)
    assert others == pytest.approx([1 + 18 + 18 + 2] * 2)


def test_workers_of_one_machine_share_its_processors() -> None:
    assert scale_up(4, 0, ALONE, Fleet(1000, 1, processors=2)) == pytest.approx([14] * 4), "7 s each, two at a time"


def test_spans_are_medians_of_warm_starts() -> None:
    def record(read_end: float, outcome: str = "hit") -> dict[str, Any]:
        spans = [
            {"name": "read", "start": 0.5, "end": read_end, "bytes": 1000},
            {"name": "import", "start": 0.6, "end": 3.5},
            {"name": "ready", "start": 6.0, "end": 6.0},
        ]
        return {"kind": "start", "outcome": outcome, "error": "", "spans": spans}

    swapped = {**record(0.6), "kind": "swap", "spans": []}
    spans = spans_of([record(1.5), record(2.5), record(4.5), record(99, "downloaded"), swapped])
    assert (spans.before_s, spans.import_s, spans.after_s, spans.read_per_s) == (0.5, 3.0, 2.5, 500)
    with pytest.raises(ValueError, match="no warm start"):
        spans_of([])
