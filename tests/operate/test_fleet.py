"""The seconds of a fleet's starts, and the change that would have saved most: figures that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from modelstore.operate.fleet import Compressed, best_change, request_s, totals

COMMIT = "a" * 40


def start(at: float, *spans: tuple[str, float, float], **changes: Any) -> dict[str, Any]:
    """A start with these spans; `ready` is at the end of the last."""
    record = {
        "at": at,
        "kind": "start",
        "worker": "w",
        "model": "org/chat",
        "commit": COMMIT,
        "dtype": "float16",
        "outcome": "hit",
        "reason": "",
        "waited_for": "",
        "error": "",
        "processors": 8,
        "spans": [{"name": name, "start": begin, "end": end} for name, begin, end in spans],
    }
    return record | changes


def form(_commit: str, _dtype: str) -> Compressed | None:
    return Compressed(share=0.6, decoding_s=8.0)


def test_all_seconds_are_shared_out() -> None:
    records = [
        start(0, ("import", 1, 5), ("read", 3, 9)),  # 2 s of both: 1 s each; 1 s before the first
        start(1, ("read", 0, 4), error="Broken: x"),
        start(2, ("read", 0, 50), kind="swap"),
    ]
    whole = totals(records)
    assert (whole.starts, whole.failed, whole.seconds) == (2, 1, 13)
    assert whole.by_step == {"import": 3, "read": 9, "between these steps": 1}
    assert sum(whole.by_step.values()) == whole.seconds
    assert whole.text == "2 starts took 13.0 s of workers' time (9.0 s read, 3.0 s import, 1.0 s between these steps)"
    assert totals([]).seconds == 0


def test_the_first_token_counts_from_the_request_if_the_queue_is_known() -> None:
    first = {"taken": 9.0, "first_token": 9.5}
    idle = start(2, ("read", 0, 8), first_job={"taken": 3600.0, "first_token": 3600.5})
    records = [start(0, ("read", 0, 8), first_job=first), start(1, ("read", 0, 8)), idle]
    assert request_s(records[0]) is None
    assert "9.5 s after the process began" in totals(records).text
    records[0]["first_job"] = first | {"queued_s": 12.0}
    assert request_s(records[0]) == 12.5
    assert totals(records).request_s == 12.5
    assert "12.5 s from the request to the first token" in totals(records).text


def test_a_model_that_was_not_there_is_to_be_seeded() -> None:
    records = [
        start(0, ("download", 1, 41), ("import", 1, 5), outcome="downloaded"),
        start(1, ("wait", 1, 40), outcome="waited"),
        *(start(n, ("read", 0, 2)) for n in range(2, 5)),
    ]
    change = best_change(records, form)
    assert change is not None
    assert change.action == "`modelstore seed org/chat --dtype float16`"
    assert change.saved_s == pytest.approx(38 + 39), "the imports that ran beside are no loss"
    assert change.because.startswith("2 of 5 starts waited that long")
    assert change.text(87) == f"{change.action} would have saved about 77 of 87 s: {change.because}"


@pytest.mark.parametrize("is_compressed", [False, True])
def test_reads_that_nothing_hides_are_to_be_shorter(is_compressed: bool) -> None:
    records = [start(n, ("import", 0, 4), ("read", 0, 24), ("transfer", 1, 24)) for n in range(3)]
    if is_compressed:
        for record in records:
            record["spans"][1]["plain_bytes"] = 10**9
    change = best_change(records, form)
    if is_compressed:
        assert change is None
        return
    assert change is not None
    assert change.action == "`modelstore compress org/chat`"
    assert change.saved_s == pytest.approx(3 * 20 * 0.4)
    assert change.because == (
        "its starts did nothing but read for 60.0 s, and compressed it has 60% of the bytes, "
        "which one processor decodes in 8.0 s"
    )
    assert best_change(records, lambda _commit, _dtype: Compressed(0.99, 8.0)) is None, "it would gain too little"
    assert best_change(records, lambda _commit, _dtype: None) is None, "it is not known"


def test_what_takes_as_long_to_decode_is_not_to_be_compressed() -> None:
    records = [start(n, ("import", 0, 4), ("read", 0, 24), processors=2) for n in range(3)]
    change = best_change(records, form)  # half a processor decodes beside the imports, in 16 s
    assert change is not None
    assert change.saved_s == pytest.approx(3 * 20 * (1 - 16 / 24))
    assert best_change(records, lambda _commit, _dtype: Compressed(0.6, 12.0)) is None
    for record in records:
        del record["processors"]  # as earlier versions wrote it
    assert best_change(records, form) is None


def test_code_that_is_compiled_again_is_to_be_kept() -> None:
    records = [start(n, ("compile", 0, 30), ("read", 0, 2)) for n in range(3)]
    change = best_change(records, form)
    assert change is not None
    assert "MODELSTORE_ENGINE_CACHE" in change.action
    assert change.saved_s == pytest.approx(2 * 29), "the first time has to be paid"
    assert best_change(records[:1], form) is None
    restored = [start(0, ("compile", 0, 50)), *(start(n, ("compile", 0, 6)) for n in range(1, 9))]
    assert best_change(restored, form) is None, "it is kept already"


@pytest.mark.parametrize("name", ["@chat", "org/a$(touch x)", "org/a`b`", "file:///models/a b;c"])
def test_a_name_that_is_no_models_is_in_no_command(name: str) -> None:
    change = best_change([start(0, ("download", 0, 40), outcome="downloaded", model=name)], form)
    assert change is not None
    assert change.action == f"Seeding {name} before the launch"


def test_the_model_that_was_waited_for_longest_is_named() -> None:
    records = [
        start(0, ("download", 0, 2), outcome="downloaded", model="org/a"),
        start(1, ("download", 0, 498), outcome="downloaded", model="org/z"),
    ]
    change = best_change(records, form)
    assert change is not None
    assert (change.action, change.saved_s) == ("`modelstore seed org/z --dtype float16`", 498)


def test_workers_that_start_for_another_model_alone_are_to_follow_an_alias() -> None:
    old = [start(n, ("import", 0, 9), worker=f"a{n}") for n in range(3)]
    new = [start(5000 + n, ("import", 0, 9), model="org/next", worker=f"b{n}") for n in range(3)]
    late = start(9000, ("import", 0, 9), model="org/next", worker="b9")
    swap = start(100, ("read", 0, 2), kind="swap")
    change = best_change([*old, swap, *new, late], form)
    assert change is not None
    assert change.saved_s == pytest.approx(3 * 7), "less a swap each; a later start is one that scaling asked for"
    assert change.because == "3 workers started anew when org/chat gave way to org/next"
    assert best_change([*old, swap, *new, start(9500, ("import", 0, 9))], form) is None, "both are served"
    assert best_change([*old, *new], form) is None, "nobody knows how long a swap takes"
    assert best_change([old[0], swap, new[0]], form) is None, "two endpoints may share a volume"


def test_what_saves_little_is_not_said() -> None:
    records = [start(n, ("import", 0, 30)) for n in range(9)]
    records.append(start(9, ("wait", 0, 2), ("import", 2, 30), outcome="waited"))
    assert best_change(records, form) is None
    assert best_change([], form) is None
    assert best_change([start(0, error="Broken: x")], form) is None
