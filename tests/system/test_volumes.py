"""Volumes that are full or read-only: real mounts, in a mount namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modelstore.store import ModelStore
from tests.conftest import OnMount, needs_mount
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.records import record

SEED = [sys.executable, "-m", "modelstore", "seed", "org/name", "--quiet"]
# statfs tells the truth on tmpfs; on RunPod it shows the whole cluster. This is what a seed sees there.
SEED_WHERE_STATFS_LIES = """
import os, sys
real = os.statvfs
os.statvfs = lambda path: os.statvfs_result((*real(path)[:4], 2**40, *real(path)[5:]))
sys.argv = ["modelstore", "seed", "org/name", "--quiet"]
from modelstore.__main__ import main
main()
"""


# Python tells an audit hook of every change that it is about to try.
HIT_WITHOUT_WRITES = """
import os, sys
root, attempts = os.environ["MODELSTORE_ROOT"], []
CHANGES = {"os.mkdir", "os.rename", "os.utime", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(root) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        attempts.append((event, arguments))
    what = arguments[0]
    if event in CHANGES and (str(what).startswith(root) or isinstance(what, int)):
        if isinstance(what, int) and os.readlink(f"/proc/self/fd/{what}").startswith("/memfd:"):
            return  # memory, on no volume
        attempts.append((event, arguments))
from dataclasses import replace
from modelstore import ModelStore
from modelstore.reference import parse_reference
from modelstore.warmstart import begin
store = ModelStore.from_env()
sys.addaudithook(watch)
path = store.ensure("org/name").path
begin(replace(store.settings, model=parse_reference("org/name"))).reading.wait_all()
assert not attempts, attempts
print(path)
"""

READ_ONLY = 'mount --bind "$VOLUME" "$VOLUME" && mount -o remount,bind,ro "$VOLUME"'


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@needs_mount
def test_a_full_volume_ends_the_download_in_one_line_and_publishes_nothing(hub: Hub, on_mount: OnMount) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(8, (512, 512)))
    done = on_mount(
        'mount -t tmpfs -o size=4m none "$VOLUME"',
        sys.executable,
        "-c",
        SEED_WHERE_STATFS_LIES,
        then="find modelstore/models 2>/dev/null",
    )
    assert done.returncode == 6, done.stderr
    assert "no space for" in error_of(done)
    record(
        "No byte is lost, and no volume overrun",
        "a full volume, statfs lies",
        tried=1,
        survived=1,
        where="tmpfs",
        figure="one line, code 6; nothing published",
    )
    assert done.stdout == ""


@needs_mount
def test_a_volume_that_takes_no_more_files_is_listed_and_cleaned(hub: Hub, on_mount: OnMount) -> None:
    write_repo(hub.folder / "org" / "name")
    modelstore = f"{sys.executable} -m modelstore"
    commands = (
        f"{modelstore} seed org/name -q && n=0 && while touch $VOLUME/$((n+=1)) 2>/dev/null; do :; done; set -e;"
        f"{modelstore} ls --json; {modelstore} gc --yes; {modelstore} rm org/name --yes; {modelstore} ls --json"
    )
    done = on_mount('mount -t tmpfs -o size=50m,nr_inodes=80 none "$VOLUME"', "bash", "-c", commands)
    assert done.returncode == 0, done.stderr
    assert '"repo_id": "org/name"' in done.stdout
    assert done.stdout.endswith("[]\n")


@needs_mount
def test_a_volume_that_says_that_it_is_too_small_is_believed(hub: Hub, on_mount: OnMount) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(8, (512, 512)))
    done = on_mount('mount -t tmpfs -o size=4m none "$VOLUME"', *SEED)
    assert done.returncode == 6
    assert "MB free" in error_of(done)
    assert hub.served.bytes["model.safetensors"] == 0


@needs_mount
def test_a_read_only_volume_is_named_if_something_must_be_written(hub: Hub, on_mount: OnMount) -> None:
    write_repo(hub.folder / "org" / "name")
    done = on_mount(READ_ONLY, *SEED)
    assert done.returncode == 1
    assert "Read-only file system" in error_of(done)
    assert "MODELSTORE_ROOT" in error_of(done)


@needs_mount
def test_a_read_only_volume_serves_its_models(hub: Hub, store: ModelStore, on_mount: OnMount) -> None:
    write_repo(hub.folder / "org" / "name")
    snapshot = store.ensure("org/name")
    hub.stop()
    done = on_mount(READ_ONLY, sys.executable, "-c", HIT_WITHOUT_WRITES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(snapshot.path)
    assert not done.stderr
    record(
        "Read-only volumes serve hits", "the volume is mounted read-only", tried=1, survived=1, where="local, remounted"
    )


@needs_mount
@pytest.mark.parametrize("statfs_lies", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_on_a_full_volume_the_least_recently_used_goes_if_that_is_allowed(
    hub: Hub, on_mount: OnMount, statfs_lies: bool, allowed: bool
) -> None:
    """7 MB: one model of 2.1 MB, and another that takes 6.3 MB while it is made."""
    for number, name in enumerate(("first", "name")):
        write_repo(hub.folder / "org" / name, random_tensors(4, (512, 512), seed=number))
    second = [sys.executable, "-c", SEED_WHERE_STATFS_LIES] if statfs_lies else SEED
    done = on_mount(
        'mount -t tmpfs -o size=7m none "$VOLUME"',
        "sh",
        "-c",
        'set -e; "$1" -m modelstore seed org/first --quiet; shift; export MODELSTORE_EVICT=$1; shift; exec "$@"',
        "sh",
        sys.executable,
        str(int(allowed)),
        *second,
        then="find modelstore/models -name manifest.json | cut -d/ -f3",
    )
    assert done.returncode == (0 if allowed else 6), done.stderr
    assert done.stdout.split() == ["org--name" if allowed else "org--first"]
