"""The records of starts, and the pages made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelstore.timeline import Span, Timeline, verdict
from modelstore.volume import history
from modelstore.volume.layout import Layout
from tests.conftest import Cli
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.starts import timeline, with_spans


def test_records_are_read_again_in_order(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for number in range(3):
        history.add(layout, timeline(worker=f"w{number}", began=time.monotonic() - 5 + number))
    history.add(layout, timeline(worker="bad", began=time.monotonic()), error="NotFound: no such model")
    found = history.starts(layout, limit=9)
    assert [record["worker"] for record in found] == ["w0", "w1", "w2", "bad"]
    assert found[-1]["error"] == "NotFound: no such model"
    assert abs(found[0]["at"] - (time.time() - 5)) < 1
    assert [record["worker"] for record in history.starts(layout, limit=2)] == ["w2", "bad"]


@pytest.mark.parametrize(
    "text",
    [json.dumps({"at": at, "error": "", "worker": "", "model": "", "commit": "", "dtype": "", "reason": "", "spans": [span]})
     for at, span in ((float("nan"), {}), (1e30, {}), (1, {"name": "a", "start": "0", "end": 1}),
                      (1, {"name": "a", "start": 0, "end": 10**400}), (1, {"name": "a", "start": 2, "end": 1}),
                      *((1, {"name": "a", "start": 1, "end": 2, "bytes": count}) for count in (10**400, -1, 1.5, "1")))]
    + ["", "{}", "[]", '{"at": "x", "spans": []}', "[" * 9999, '{"at": 1, "error": "", "spans": [{"name": "a"}]}',
     json.dumps({"at": 1, "error": "", "worker": 7, "model": "", "commit": "", "dtype": "", "reason": "", "spans": []})],
)  # fmt: skip
def test_a_damaged_record_is_passed_over(tmp_path: Path, text: str) -> None:
    layout = Layout(tmp_path)
    history.add(layout, timeline())
    day = next(layout.starts.iterdir())
    (day / "0.x.json").write_text(text)
    assert len(history.starts(layout, limit=9)) == 1


def test_a_terminal_obeys_nothing_that_a_record_says(cli: Cli, store_env: dict[str, str]) -> None:
    layout = Layout(Path(store_env["MODELSTORE_ROOT"]))
    evil = "\x1b[31mX\x1b]0;title\x07\ud800"
    history.add(layout, with_spans(timeline(worker=evil, model=evil), Span(evil, 0.1, 3), Span("ready", 3, 3)))
    for encoding in ("utf-8", "ascii"):
        cli.env["PYTHONIOENCODING"] = encoding
        for command in (["history"], ["report", "--text"], ["metrics"]):
            shown = cli(*command).stdout
            assert "X" in shown
            assert not {"\x1b", "\x07"} & set(shown)


def test_days_older_than_a_month_go(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for day in range(1, 32):
        (layout.starts / f"2020-01-{day:02d}").mkdir(parents=True)
    history.add(layout, timeline())
    days = sorted(path.name for path in layout.starts.iterdir())
    assert len(days) == history.KEPT_DAYS
    assert days[0] == "2020-01-03"


def test_a_volume_that_takes_no_record_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    history.add(Layout(tmp_path / "file"), timeline())
    assert "not in the volume's history" in caplog.text
    newer = Layout(tmp_path / "newer")
    newer.root.mkdir()
    newer.format_file.write_text("99\n")
    history.add(newer, timeline())
    assert not newer.starts.exists(), "nothing is written into a store of another format"


@pytest.mark.parametrize(
    ("spans", "changes", "words"),
    [
        (
            [Span("wait", 1, 13), Span("read", 13, 19)],
            {"waited_for": "abc"},
            "12.0 s of 19.0 s waiting for worker abc's download",
        ),
        ([Span("wait", 1, 13), Span("read", 13, 19)], {}, "waiting for another worker's download"),
        (
            [Span("read", 1, 6, 1_500_000_000), Span("import", 0, 4)],
            {},
            "2.0 s of 6.0 s reading the weights from the volume at 300 MB/s; 3.0 s more at the same time as importing lib",
        ),
        (
            [Span("import", 0, 2), Span("import", 3, 5), Span("read", 0, 3)],
            {},
            "2.0 s of 5.0 s importing libraries; 2.0",
        ),
        (
            [Span("import", 0, 2, detail="torch"), Span("import", 2, 5, detail="transformers"), Span("read", 0, 5.5)],
            {},
            "0.5 s of 5.5 s reading the weights from the volume; 3.0 s more at the same time as importing transformers",
        ),
        (
            [Span("download", 0, 100), Span("convert", 5, 98)],
            {},
            "7.0 s of 100.0 s fetching the model's files from their source; 93.0 s more at the same time as converting",
        ),
        (
            [Span("read", 0, 5), Span("import", 0, 5, detail="torch")],
            {},
            "5.0 s of 5.0 s importing torch and reading the weights from the volume at the same time",
        ),
        ([], {}, "nothing was recorded"),
    ],
)
def test_the_slowest_part_is_named_in_words(spans: list[Span], changes: dict[str, str], words: str) -> None:
    record = {"error": "", **with_spans(timeline(**changes), *spans).as_json()}
    assert words in verdict(record)


@pytest.mark.slow
def test_a_worker_keeps_the_record_of_its_start_and_of_a_failed_one(
    hub: Hub, cli: Cli, store_env: dict[str, str]
) -> None:
    write_model(hub.folder / "org" / "name", seed=1)
    for model, code in (("org/name", 0), ("org/missing", 3)):
        done = subprocess.run(
            [sys.executable, "-m", "handler", "--test_input", '{"input": {"prompt": "hello", "max_tokens": 1}}'],
            env=os.environ | store_env | {"MODEL_ID": model}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    good, bad = cli.json("history")
    assert (good["model"], good["outcome"], good["error"]) == ("org/name", "downloaded", "")
    assert {span["name"] for span in good["spans"]} >= {"download", "read", "ready"}
    assert bad["error"].startswith("RepoNotFound: ")
    assert [record["model"] for record in cli.json("history", "--model", "org/name", "--limit", "1")] == ["org/name"]
    assert cli("history", "--model", "org/other").stdout == "no start of org/other has been recorded yet\n"
    shown = cli("report", "--text").stdout
    assert "org/name  downloaded" in shown
    assert "failed: RepoNotFound" in shown
    assert "█" in shown


def test_the_first_job_is_added_to_the_record_of_its_start(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    path = history.add(layout, Timeline(worker="w1", model="org/name"))
    assert path is not None
    history.add_first_job(path, {"taken": 8.0, "first_token": 8.25, "queued_s": 9.5})
    (record,) = history.starts(layout, limit=9)
    assert record["first_job"] == {"taken": 8.0, "first_token": 8.25, "queued_s": 9.5}
    for damaged in ({"taken": "x", "first_token": 1}, {"taken": -1, "first_token": 1}):
        history.add_first_job(path, damaged)  # type: ignore[arg-type]
        assert history.starts(layout, limit=9) == []
    history.add_first_job(path, {"taken": 1})
    assert "first_job" not in history.starts(layout, limit=9)[0]
    history.add_first_job(tmp_path / "gone.json", {"taken": 1.0, "first_token": 2.0})
    assert not (tmp_path / "gone.json").exists()
