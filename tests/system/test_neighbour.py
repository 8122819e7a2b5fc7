"""Files that a neighbour plants on the volume: nothing hangs, fills the memory, is written through, or reaches a terminal.

Another user who can write the volume can of course delete and replace files there (docs/security.md).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelstore.errors import ModelStoreError, UnsafeName
from modelstore.fill.hf_cache import export_to_hf_cache
from modelstore.store import ModelStore
from modelstore.volume import durable, pins
from modelstore.volume.claim import ClaimRecord, Contender
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.verify import Position, save_position
from tests.conftest import Cli
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

OTHER = SnapshotKey("org/other", "d" * 40, "float16")
LOOKS = (
    ("ls",),
    ("du",),
    ("claims",),
    ("watch", "--count", "1"),
    ("history",),
    ("report", "--out", "page.html"),
    ("metrics",),
    ("gc", "--dry-run"),
    ("verify",),
    ("show", "org/name"),
    ("path", "org/name"),
    ("alias", "ls"),
)
# Runs the commands in one process, since each start of Python takes longer than they do.
RUN = """
import json, sys
from modelstore.cli.main import app
from modelstore.cli.app import prepare_streams
prepare_streams()
for command in json.loads(sys.argv[1]):
    print("$", *command, flush=True)
    print("exit", app(command, standalone_mode=False) or 0, flush=True)
"""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200 << 30)


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").touch()


PLANTS: tuple[Callable[[Path], None], ...] = (pipe, unix_socket, huge, link, folder)
RECORDS = (
    "clock",
    "mark",
    "last",
    "alias",
    "ref",
    "pin",
    "claim",
    "space claim",
    "start",
    "event",
    "verified",
    "FORMAT",
)


@pytest.fixture
def seeded(hub: Hub, store: ModelStore) -> SnapshotKey:
    write_repo(hub.folder / "org" / "name")
    key = store.set_alias("chat", "org/name").key
    pins.volume_time(store.layout)
    return key


def place(store: ModelStore, key: SnapshotKey, record: str) -> Path:
    layout = store.layout
    path = {
        "clock": layout.root / "used" / ".clock",
        "mark": layout.used(key) / "worker.0123abcd",
        "last": layout.used(key) / ".last",
        "alias": layout.alias("other"),
        "ref": layout.ref("org/name", "v1"),
        "pin": layout.pin(key),
        "claim": layout.claims(OTHER) / "1",
        "space claim": layout.space_claim / "1",
        "start": layout.starts / time.strftime("%Y-%m-%d") / "1.worker.0123abcd.json",
        "event": layout.events / time.strftime("%Y-%m-%d") / "1.evicted.0123abcd.json",
        "verified": layout.verified(key),
        "FORMAT": layout.format_file,
    }[record]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def looked(env: dict[str, str], commands: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(
        command, env=os.environ | env, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("record", RECORDS)
def test_no_command_hangs_or_fills_the_memory_for_a_file_in_a_records_place(
    store: ModelStore, seeded: SnapshotKey, cli: Cli, tmp_path: Path, record: str
) -> None:
    env = cli.env | {"MODELSTORE_QUOTA": "1GB"}
    for plant in PLANTS:
        path = place(store, seeded, record)
        plant(path)
        began = time.monotonic()
        done = looked(env, LOOKS, tmp_path)
        assert time.monotonic() - began < 30
        exits = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
        if record != "FORMAT":  # a store whose format is not known is not looked at
            assert exits == ["exit 0"] * len(LOOKS), (plant.__name__, done.stdout, done.stderr)
        if path.is_dir() and not path.is_symlink():
            (path / "inside").unlink()
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("record", RECORDS)
def test_seeding_and_using_a_model_outlive_a_file_in_a_records_place(
    hub: Hub, store: ModelStore, seeded: SnapshotKey, record: str
) -> None:
    write_repo(hub.folder / "org" / "fresh")
    for number, plant in enumerate(PLANTS):
        path = place(store, seeded, record)
        plant(path)
        began = time.monotonic()
        with suppress(ModelStoreError, OSError):
            store.ensure(f"org/fresh@{hub.commit(hub.folder / 'org' / 'fresh')}")
        with suppress(ModelStoreError, OSError):
            pins.UsageMark(store.layout, seeded, f"worker-{number}").end()
        save_position(store.layout, seeded, Position(3, 1, 1))
        assert time.monotonic() - began < 20
        if path.is_dir() and not path.is_symlink():
            (path / "inside").unlink(missing_ok=True)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


EVIL = "\x1b[2J\x1b]0;owned\x07‮\nstart failed: "
BYTES = os.fsdecode(b"\xff\xfe")


def test_names_on_the_volume_reach_no_terminal_raw(
    hub: Hub, store: ModelStore, seeded: SnapshotKey, cli: Cli, tmp_path: Path
) -> None:
    layout = store.layout
    for number, name in enumerate((EVIL, BYTES)):
        (layout.models / f"org--{name}").mkdir()
        (layout.models / f"org--{name}" / f"{'a' * 40}.float16").mkdir()
        (layout.models / "org--name" / name).mkdir()
        (layout.snapshot(seeded) / f"{name}.txt").touch()
        (layout.used(seeded) / f"{name}.{number:08x}").touch()
        (layout.root / "staging" / f"org--{name}").mkdir(parents=True)
        (layout.trash / f"org--{name}--{'a' * 40}.float16.0123abcd").mkdir(parents=True)
        (layout.aliases / f"{name}.json").touch()
        held = layout.claims(SnapshotKey(f"org/n{number}", "a" * 40, "float16"))
        held.mkdir(parents=True)
        record = ClaimRecord(worker=name, host=name, pid=1, phase=name)
        (held / "1").write_bytes(json.dumps({each: getattr(record, each) for each in record.__slots__}).encode())
        day = layout.starts / "2026-01-01"
        day.mkdir(parents=True, exist_ok=True)
        span = {"name": name, "start": 0, "end": 1}
        texts = dict.fromkeys(("worker", "model", "commit", "dtype", "reason", "error", "outcome"), name)
        (day / f"1.{number}.0123abcd.json").write_text(json.dumps({"at": 1, "spans": [span], **texts}))
    done = looked(cli.env | {"MODELSTORE_QUOTA": "1GB"}, [*LOOKS, ["report", "--text"], ["doctor"]], tmp_path)
    for said in (done.stdout, done.stderr):
        assert "\x1b" not in said
        assert "\x07" not in said
        assert "\u202e" not in said
        assert not [line for line in said.splitlines() if line.startswith("start failed")]
    page = (tmp_path / "page.html").read_text()
    assert "\x1b" not in page
    exits = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert exits[: exits.index("exit 5")] == ["exit 0"] * LOOKS.index(("verify",)), "it finds the foreign files"
    assert len(exits) == len(LOOKS) + 2


def test_a_folder_of_marks_that_became_a_link_loses_none_of_its_files(
    store: ModelStore, seeded: SnapshotKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("report.txt", "notes.0123abcd"):
        (precious / name).touch()
        os.utime(precious / name, (1, 1))
    monkeypatch.setattr(pins, "_TOUCH_EVERY_S", 0.3)
    mark = pins.UsageMark(store.layout, seeded, "worker")
    used = store.layout.used(seeded)
    time.sleep(0.1)  # the first touch is over, and the next one far enough
    used.rename(used.with_name("moved"))
    used.symlink_to(precious)
    time.sleep(1)
    assert sorted(path.name for path in precious.iterdir()) == ["notes.0123abcd", "report.txt"]
    used.unlink()
    mark.end()


@pytest.mark.parametrize("part", ["models--org--name", "models--org--name/blobs", "models--org--name/refs"])
def test_an_export_follows_no_planted_link(hub: Hub, store: ModelStore, tmp_path: Path, part: str) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name", dtype="keep")
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    outside.mkdir()
    (cache / part).parent.mkdir(parents=True)
    (cache / part).symlink_to(outside)
    with pytest.raises(UnsafeName, match="is a link"):
        export_to_hf_cache(snapshot, cache, revision="main")
    assert list(outside.iterdir()) == []


def test_staging_with_a_planted_link_is_not_written_through(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    key = SnapshotKey("org/name", hub.commit(repo), "float16")
    outside = tmp_path / "outside"
    outside.mkdir()
    for part in ("source", "snapshot", "journal", "done"):
        planted = store.layout.staging(key) / "1" / part
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.symlink_to(outside)
        with pytest.raises(UnsafeName, match="is a link"):
            store.ensure("org/name")
        planted.unlink()
        store.layout.claims(key).joinpath("1").unlink()
    assert list(outside.iterdir()) == []


def test_a_file_larger_than_any_record_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record"
    huge(path)
    with pytest.raises(OSError, match="larger than"):
        durable.read_file(path)
    path.write_bytes(b"x" * 100)
    assert durable.read_file(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="larger than"):
        durable.read_file(path, 99)


def test_records_of_a_day_generations_and_marks_do_not_grow_without_end(
    store: ModelStore, seeded: SnapshotKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As workers leave them that start, fail and are started again, in a loop."""
    from modelstore.timeline import Timeline
    from modelstore.volume import history

    monkeypatch.setattr(durable, "sync", lambda *_args, **_more: None)
    monkeypatch.setattr(durable, "sync_path", lambda _path: None)
    now = time.monotonic()
    for number in range(400):
        history.add(
            store.layout, Timeline(worker=f"w{number}", model="org/name", began=now - 4000 + 2 * number), error="no"
        )
        history.record_event(store.layout, "evicted", seeded)
    assert len(list(store.layout.starts.rglob("*.json"))) == history.KEPT_A_DAY
    assert len(list(store.layout.events.rglob("*.json"))) == history.KEPT_A_DAY
    assert history.starts(store.layout, limit=1)[0]["worker"] == "w399", "the latest are kept"
    foreign = next(store.layout.starts.iterdir()) / "0-notes.json"
    foreign.touch()
    history.add(store.layout, Timeline(worker="last", model="org/name"))
    assert foreign.exists(), "what the store did not make stays"

    for _ in range(40):
        claim: Any = Contender(store.layout.claims(OTHER), worker="w", lease_s=30).try_claim()
        claim.finish("released")
    assert len(list(store.layout.claims(OTHER).iterdir())) <= 10

    for number in range(100):
        mark = store.layout.used(seeded) / f"w{number}.{number:08x}"
        mark.touch()
        os.utime(mark, (time.time() - 600, time.time() - 600))
    last = pins.UsageMark(store.layout, seeded, "w")
    until = time.monotonic() + 60
    while len(list(store.layout.used(seeded).iterdir())) > 70 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(list(store.layout.used(seeded).iterdir())) <= 70
    last.end()
