"""One suite of a store's behaviours over real mounts of each kind, two mounts a volume; each kind says what it can do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelstore import ModelStore
from modelstore.operate.doctor import diagnose
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.warmstart import begin
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.mounts import KINDS, Volume, mounted, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What one mount of each kind can and cannot show, and what two mounts show of each other.
NEEDED = ("exclusive create", "refused rename", "random writes", "fresh names", "fresh bytes")
ALONE = {
    "bindfs": dict.fromkeys(("exclusive create", "fresh names", "fresh bytes", "locks"), "unproven"),
    "juicefs": {},
    "s3fs": dict.fromkeys(("exclusive create", "fresh names", "fresh bytes", "locks"), "unproven")
    | {"hard links": "no"},
    "rclone": dict.fromkeys(("exclusive create", "fresh names", "fresh bytes", "locks"), "unproven")
    | {"hard links": "no", "refused rename": "no"},
}
ALONE["rclone, full"] = ALONE["rclone"]
ALONE["rclone, off"] = ALONE["rclone"] | {"random writes": "no"}
TOGETHER = {
    "bindfs": {"locks": "no"},
    "juicefs": {},
    "s3fs": {"exclusive create": "no", "hard links": "no", "locks": "no"},
    "rclone": {
        "exclusive create": "no",
        "refused rename": "no",
        "fresh names": "no",
        "hard links": "no",
        "locks": "no",
    },
}
TOGETHER["rclone, full"] = TOGETHER["rclone"]
TOGETHER["rclone, off"] = {name: "no" for name in TOGETHER["rclone"] if name != "fresh names"} | {"random writes": "no"}
MODES = {"juicefs": "full"}  # all others are read-only


@pytest.fixture(scope="module", params=KINDS)
def volume(request: pytest.FixtureRequest) -> Iterator[Volume]:
    if reason := why_not(request.param):
        pytest.skip(reason)
    with mounted(request.param) as volume:
        yield volume


@pytest.fixture
def settings(volume: Volume, hub: Hub, request: pytest.FixtureRequest) -> Settings:
    """A store of this test's own on the first mount."""
    folder = volume.first / f"{abs(hash(request.node.name)) % 10**9}"
    folder.mkdir()
    return Settings(root=folder / "modelstore", hf_endpoint=hub.url)


def on_the_other(volume: Volume, settings: Settings) -> Settings:
    return replace(settings, root=volume.second / settings.root.relative_to(volume.first))


def modelstore(settings: Settings, *words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"MODELSTORE_ROOT": str(settings.root), "HF_ENDPOINT": settings.hf_endpoint, **variables}
    if settings.volume_mode:
        env["MODELSTORE_VOLUME"] = settings.volume_mode
    done = subprocess.run(
        [sys.executable, "-m", "modelstore", *words], env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    """Whether something is so in time: a mount may see late what the other one wrote."""
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def levels(settings: Settings, **options: Any) -> dict[str, tuple[str, str]]:
    checks = diagnose(settings, probe_bytes=1 << 20, **options)
    return {check.check: (check.level, check.what) for check in checks}


def answers(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    """What the doctor says of each capability, but for those that are there."""
    said = {"it is not so": "no", "not proven: ": "unproven"}
    names = (*NEEDED, "hard links", "locks")
    wordings = {name: found[name][1] for name in names if found[name][0] != "ok"}
    return {name: said[text[:12]] for name, text in wordings.items()}


def test_the_doctor_says_well_only_of_what_it_has_seen(volume: Volume, settings: Settings) -> None:
    alone = levels(settings)
    assert answers(alone) == ALONE[volume.kind]
    mode = MODES.get(volume.kind, "read-only")
    assert alone["mode"][1].startswith(mode)
    assert (alone["mode"][0] == "ok") == (mode == "full")
    together = levels(settings, peer=on_the_other(volume, settings).root)
    found = answers(together)
    found.pop("fresh bytes", None)  # late if names are late
    assert found == TOGETHER[volume.kind]


def put_there(settings: Settings, hub: Hub, tmp_path: Path) -> ModelStore:
    """A store with one model, filled from afar, as `seed --to` does it: files first, the manifest last."""
    local = ModelStore(tmp_path / "local", settings=Settings(root=tmp_path / "local", hf_endpoint=hub.url))
    snapshot = local.ensure("org/name")
    for path in sorted(local.layout.root.rglob("*"), key=lambda path: (path.name == "manifest.json", path)):
        relative = path.relative_to(local.layout.root)
        if path.is_file() and relative.parts[0] in ("models", "refs", "FORMAT"):
            (settings.root / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, settings.root / relative)
    assert snapshot.path.is_dir()
    return local


def test_what_was_put_there_is_served_and_nothing_is_changed(
    volume: Volume, settings: Settings, hub: Hub, tmp_path: Path
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(4, (64, 64)), shards=2)
    write_repo(hub.folder / "org" / "other", random_tensors(1, (8, 8)))
    put_there(settings, hub, tmp_path)
    other = on_the_other(volume, settings)
    assert within(60, lambda: ModelStore(other.root, settings=other).lookup("org/name") is not None)
    hub.served.bytes.clear()
    assert modelstore(other, "path", "org/name").stdout.strip().startswith(str(other.root))
    modelstore(other, "verify", "org/name")
    start = begin(replace(other, model=parse_reference("org/name")))
    start.reading.wait_all()
    assert start.timeline.outcome == "hit"
    start.reading.close()
    start.in_use.end()
    assert modelstore(other, "seed", "org/name").stdout.startswith("present")
    assert not any(hub.served.bytes[name] for name in hub.served.bytes if name.endswith(".safetensors"))
    if MODES.get(volume.kind) == "full":
        return
    for words in (["seed", "org/other"], ["rm", "org/name", "--yes"], ["pin", "org/name"]):
        (line,) = (line for line in modelstore(other, *words, code=1).stderr.splitlines() if "error: " in line)
        assert "read-only" in line, words
    # Without a cache of writes rclone leaves the start's mark of use as it was made: nothing may go then.
    in_use = volume.kind == "rclone, off"
    refused = modelstore(other, "gc", "--to", "0B", "--yes", code=6 if in_use else 1).stderr
    assert ("is in use" if in_use else "read-only") in refused
    assert ModelStore(other.root, settings=other).lookup("org/name") is not None
    assert not hub.served.bytes["model.safetensors"]


@pytest.fixture
def full(volume: Volume, settings: Settings) -> Settings:
    """The same for a volume that takes writes in any order, used as if it could do all that a store needs."""
    if volume.kind.startswith("rclone"):
        pytest.skip("a folder is replaced by a rename there: no store is made on it")
    return replace(settings, volume_mode="full")


def test_four_seeders_on_two_mounts_make_one_snapshot(volume: Volume, full: Settings, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(4, (128, 128)), shards=2)
    other = on_the_other(volume, full)
    env = os.environ | {"HF_ENDPOINT": hub.url, "MODELSTORE_VOLUME": "full"}
    seeders = [
        subprocess.Popen(
            [sys.executable, "-m", "modelstore", "seed", "org/name", "-q"],
            env=env | {"MODELSTORE_ROOT": str((full, other)[number % 2].root), "RUNPOD_POD_ID": f"w{number}"},
            stderr=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    try:
        errors = [seeder.communicate(timeout=400)[1] for seeder in seeders]
    finally:
        for seeder in seeders:
            seeder.kill()
    assert [seeder.returncode for seeder in seeders] == [0] * 4, errors
    for each in (full, other):
        assert within(60, lambda: ModelStore(each.root, settings=each).lookup("org/name") is not None)  # noqa: B023
        modelstore(each, "verify")


def test_a_download_that_was_killed_goes_on_from_the_other_mount(volume: Volume, full: Settings, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(8, (256, 256)), shards=4)
    hub.faults.bytes_per_s = 1e6
    env = os.environ | {"HF_ENDPOINT": hub.url, "MODELSTORE_VOLUME": "full", "MODELSTORE_ROOT": str(full.root)}
    seeder = subprocess.Popen([sys.executable, "-m", "modelstore", "seed", "org/name", "-q"], env=env)
    staging = full.root / "staging"
    try:
        assert within(120, lambda: any(staging.glob("*/*/*/done/*.safetensors.json")))
    finally:
        seeder.send_signal(signal.SIGKILL)
        seeder.wait()
    hub.faults.bytes_per_s = 0
    other = on_the_other(volume, full)
    assert within(60, lambda: any((other.root / "staging").glob("*/*/*/done/*.safetensors.json")))
    record = json.loads(modelstore(other, "seed", "org/name", "--json", MODELSTORE_LEASE_S="5").stdout)
    assert record["status"] == "resumed"
    modelstore(other, "verify")


def test_wrong_bytes_are_found_and_mended(volume: Volume, full: Settings, hub: Hub) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(2, (64, 64)))
    modelstore(full, "seed", "org/name", "-q")
    path = Path(modelstore(full, "path", "org/name").stdout.strip()) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    modelstore(full, "verify", code=5)
    modelstore(full, "seed", "org/name", "-q")
    modelstore(full, "verify")
    assert len(list((full.root / "quarantine").iterdir())) == 1


def test_a_mount_whose_daemon_is_gone_is_one_line(hub: Hub) -> None:
    if reason := why_not("s3fs"):
        pytest.skip(reason)
    with mounted("s3fs") as volume:
        settings = Settings(root=volume.first / "modelstore", hf_endpoint=hub.url)
        volume.daemons[0].kill()
        volume.daemons[0].wait()
        done = modelstore(settings, "seed", "org/name", code=1)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.stderr
