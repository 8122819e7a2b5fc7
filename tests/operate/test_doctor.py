"""`modelstore doctor`: each check on a sound volume, and on one with a fault."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelstore.bench.checkpoints import make_checkpoint
from modelstore.errors import NoSpace, RootUnusable
from modelstore.mount import check_place
from modelstore.operate import doctor
from modelstore.operate.compression import estimate
from modelstore.operate.doctor import CheckResult, diagnose, exit_code
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.volume import durable, trials
from tests.conftest import Cli, MakeStore
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub

MFS = "mfs#10.0.0.1:9421 {} fuse {} 0 0\n"


def found(settings: Settings, **options: Any) -> dict[str, CheckResult]:
    return {finding.check: finding for finding in diagnose(settings, probe_bytes=1 << 20, **options)}


@pytest.fixture
def on_mfs(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """The store, as if its folder were a network volume mounted with these options."""
    store.layout.root.mkdir(parents=True)

    def settings(options: str = "rw,relatime") -> Settings:
        table = MFS.format(store.layout.root, options)
        monkeypatch.setattr(doctor, "read_mounts", lambda: table)
        return store.settings

    return settings


def test_it_says_what_compression_would_give_at_the_measured_rate_and_on_this_host(
    hub: Hub, store: ModelStore, tmp_path: Path
) -> None:
    bench = make_checkpoint(tmp_path / "model", 40_000_000, "float16", born="bfloat16")
    snapshot = store.ensure(f"file://{bench}")
    slow, fast = (estimate(snapshot, rate, processors=2) for rate in (100e6, 100e9))
    assert slow.is_worth_it
    assert slow.compressed_s == pytest.approx(0.69 * slow.plain_s, rel=0.03)
    assert not fast.is_worth_it
    few, many = (estimate(snapshot, 1e9, processors=number) for number in (2, 16))
    assert many.is_worth_it
    assert few.compressed_s > many.compressed_s
    text = found(store.settings)["compression"].what
    assert f"`modelstore compress {snapshot.repo_id}`" in text or "only save space" in text
    assert "compression" not in found(replace(store.settings, root=tmp_path / "empty" / "modelstore"))


def test_a_sound_volume_has_nothing_but_ok(on_mfs: Callable[[str], Settings], hub: Hub) -> None:
    settings = replace(on_mfs("rw"), quota_bytes=10**9, hf_token=hub.token)
    write_repo(hub.folder / "org" / "name")
    findings = found(settings, reference="org/name")
    assert [finding for finding in findings.values() if finding.level == "error"] == []
    assert findings.keys() >= {
        "mount", "format", "exclusive create", "refused rename", "random writes", "fresh names", "fresh bytes",
        "hard links", "locks", "mode", "clock", "write rate", "read rate",
        "quota", "leftovers", "token", "access",
    }  # fmt: skip
    assert "alice" in findings["token"].what
    assert findings["mount"].level == "ok"
    assert exit_code(list(findings.values())) == 0
    assert not list((settings.root / "trash").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("options", "level", "words"),
    [("ro", "error", "read-only"), ("rw,mfsnobsdlocks", "warning", "mfsnobsdlocks"), ("rw", "ok", "MooseFS")],
)
def test_the_mounts_options(on_mfs: Callable[[str], Settings], options: str, level: str, words: str) -> None:
    finding = found(on_mfs(options))["mount"]
    assert finding.level == level
    assert words in finding.what


def test_a_folder_that_is_no_volume_is_told_from_one(store: ModelStore) -> None:
    finding = found(store.settings)["mount"]
    assert finding.level == "warning"
    assert "other workers do not see it" in finding.why


def rename_that_replaces(source: Path, target: Path) -> None:
    durable.remove_tree(target)
    os.rename(source, target)


def create_twice(path: Path, *, exclusive: bool = False) -> int:
    return os.open(path, os.O_CREAT | os.O_WRONLY)


def no_links(_source: Path, _target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize(
    ("name", "fake", "check", "level"),
    [
        ("rename", rename_that_replaces, "refused rename", "error"),
        ("open_for_write", create_twice, "exclusive create", "error"),
        ("link", no_links, "hard links", "warning"),
    ],
)
def test_a_file_system_that_breaks_the_protocol_is_found(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, name: str, fake: Any, check: str, level: str
) -> None:
    monkeypatch.setattr(durable, name, fake)
    finding = found(store.settings)[check]
    assert finding.level == level
    assert finding.why
    assert finding.do


def test_locks_that_no_other_host_sees(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda _fd, _how: None)
    assert found(store.settings)["locks"].level == "warning"


def test_a_clock_that_is_off(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() + 3600)
    finding = found(store.settings)["clock"]
    assert finding.level == "warning"
    assert "+3600 s" in finding.what


def test_a_peer_that_is_another_volume(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_LOOK_FOR_S", 0.5)
    findings = found(store.settings, peer=tmp_path / "elsewhere")
    assert findings["peer"].level == "error"
    assert findings["locks"].level == "ok", "the rest is looked at all the same"


def test_a_peer_of_the_same_volume(store: ModelStore, tmp_path: Path) -> None:
    store.layout.root.mkdir(parents=True)
    (tmp_path / "second").symlink_to(store.layout.root)
    findings = found(store.settings, peer=tmp_path / "second")
    assert findings["fresh names"].level == findings["fresh bytes"].level == "ok"
    assert "the other mount" in findings["locks"].what
    assert "12 races" in findings["exclusive create"].what


@pytest.mark.parametrize("name", ["rename", "link", "open_for_write"])
def test_a_download_that_empties_the_trash_meanwhile(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call = getattr(durable, name)

    def emptied(path: Path, *rest: Any, **options: Any) -> Any:
        if path.name in ("staged", "one", "rate"):
            shutil.rmtree(store.layout.trash, ignore_errors=True)
        return call(path, *rest, **options)

    monkeypatch.setattr(durable, name, emptied)
    findings = found(store.settings)
    assert findings["write"].level == "warning"
    assert "emptied the trash" in findings["write"].what
    assert "quota" in findings, "it goes on with what needs no folder"


def test_a_volume_that_is_full_before_its_clock_was_made(
    hub: Hub, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repo(hub.folder / "org" / "name")
    store.ensure("org/name")

    def full(path: Path) -> float:
        raise NoSpace(f"no space for {path}")

    monkeypatch.setattr(durable, "touch", full)
    findings = {finding.check: finding for finding in diagnose(store.settings, reference="org/name")}
    assert (findings["space"].exit_code, findings["leftovers"].level) == (6, "ok"), "to look it needs no room"
    assert findings["access"].level == "ok", "what needs no room was looked at all the same"


def test_exit_codes_are_those_of_the_errors(hub: Hub, cli: Cli, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "gated")
    hub.gated.add("org/gated")
    assert cli("doctor", "org/missing", code=3).stdout.count("error") == 1
    cli.env["HF_TOKEN"] = "hf_wrong"
    shown = cli("doctor", code=4)
    assert "HF_TOKEN" in shown.stdout
    assert "hf_wrong" not in shown.stdout + shown.stderr
    del cli.env["HF_TOKEN"]
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    (snapshot.path / snapshot.weights[0].path).unlink()
    records = cli.json("doctor", code=5)
    assert [record["check"] for record in records if record["level"] == "error"] == ["snapshots"]
    store.layout.format_file.write_text("99\n")
    assert "has store format '99'" in cli("doctor", code=8).stdout
    assert cli("doctor", "--root", "/dev/null/x", code=1).stdout.count("error") >= 1
    assert "full path" in cli("doctor", "--peer", "x", code=2).stderr


def test_access_is_the_result_of_a_start(hub: Hub, store: ModelStore, make_store: MakeStore, tmp_path: Path) -> None:
    write_repo(hub.folder / "org" / "name")
    write_repo(hub.folder / "org" / "other")

    def access(reference: str, **changes: Any) -> tuple[str, str]:
        finding = found(make_store(**changes).settings, reference=reference)["access"]
        return finding.level, finding.what

    assert access("org/name")[0] == "ok"
    assert access("org/name", offline=True)[0] == "error"
    store.set_alias("chat", "org/name")
    assert "is published" in access("org/name", offline=True)[1]
    assert "is published" in access("@chat")[1]
    assert access("@nobody")[0] == "error"
    assert access(f"file://{hub.folder / 'org' / 'name'}", offline=True)[0] == "ok"
    assert "is not a folder" in access("file:///nowhere")[1]
    assert access("org/other")[0] == "ok"
    assert access("org/missing")[0] == "error"


def test_a_place_for_a_store(hub: Hub, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store's parents may be missing on a mounted volume and below the user's home; elsewhere that is a mistake."""
    check_place(tmp_path / "modelstore")
    check_place(Path("/dev/shm/team/modelstore"))
    with pytest.raises(RootUnusable, match="there is no folder"):
        check_place(tmp_path / "mistyped" / "modelstore")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_place(tmp_path / ".cache" / "modelstore")


def test_leftovers_and_a_quota_that_is_nearly_used(hub: Hub, store: ModelStore) -> None:
    write_repo(hub.folder / "org" / "name")
    taken = store.ensure("org/name").size_bytes
    assert found(replace(store.settings, quota_bytes=taken + 10_000))["quota"].level == "warning"
    left = store.layout.trash / "doctor-0123abcd"
    left.mkdir(parents=True)
    (left / "file").write_bytes(b"x" * 1000)
    os.utime(left, (1, 1))
    os.utime(left / "file", (1, 1))
    assert "1 leftovers" in found(store.settings)["leftovers"].what
