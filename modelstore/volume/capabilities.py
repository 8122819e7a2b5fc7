"""What a volume can do, and the mode in which the store uses it.

    full         models are stored, removed and exchanged, as the rest of the package does it
    read-only    published models are served; nothing that others read is changed

A trial on one mount shows what does not work. It cannot show what another host sees: that counts as done only for a
kind of file system that is known to do it, or by a trial on two mounts (`modelstore doctor --peer`). Correctness never
rests on one of these alone; a volume without them elects two workers, loses a snapshot or serves half of one.

The trial (`trials.py`) takes a folder of its own in the store's trash, before the first change of a process; its result
is kept on this host for the mount. A hit never asks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from modelstore.errors import ModelStoreError, NoSpace, ReadOnlyVolume, RootUnusable
from modelstore.mount import Kind, kind_of, mount_of, read_mounts
from modelstore.runtime import runtime_folder
from modelstore.settings import Settings, VolumeMode
from modelstore.volume import durable, tree, trials
from modelstore.volume.layout import Layout
from modelstore.volume.trials import Answer

logger = logging.getLogger(__name__)

_VERSION = 1  # of the trials; another one makes them again


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a volume can do, each `yes`, `no` or `unproven`; `notes` has what was seen, by the capability's name."""

    exclusive_create: Answer = "unproven"
    refused_rename: Answer = "unproven"
    random_writes: Answer = "unproven"
    fresh_names: Answer = "unproven"
    fresh_bytes: Answer = "unproven"
    hard_links: Answer = "unproven"
    locks: Answer = "unproven"
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Meaning:
    """A capability for a person: what the volume does, what happens without it, and what to do then. `is_needed`: the
    mode full rests on it."""

    text: str
    without: str
    remedy: str = "use the volume as it is, read-only, or another volume"
    is_needed: bool = True


MEANINGS: Mapping[str, Meaning] = {
    "exclusive_create": Meaning(
        "one of many hosts creates a file, and the others are refused", "two workers could both begin a download"
    ),
    "refused_rename": Meaning(
        "a folder that holds files is not replaced by a rename", "a second publisher could replace a snapshot"
    ),
    "random_writes": Meaning("a file is written in any order, and reads back so", "a download cannot be stored"),
    "fresh_names": Meaning(
        "a new file is seen by another host at once",
        "workers see claims and new snapshots late",
        "mount it with shorter caches of names, and try again",
    ),
    "fresh_bytes": Meaning(
        "the bytes of a file that was synced are read by another host",
        "a snapshot is published before its bytes are there",
        "mount it without a cache of writes, and try again",
    ),
    "hard_links": Meaning(
        "a file has two names", "files of two variants are stored twice", "plan more space", is_needed=False
    ),
    "locks": Meaning(
        "a lock of a process is seen by others",
        "a dead worker is found by its heartbeat, later",
        "nothing: the store is correct without locks",
        is_needed=False,
    ),
}
_ACROSS_HOSTS = ("exclusive_create", "fresh_names", "fresh_bytes", "locks")


@dataclass(frozen=True, slots=True)
class Use:
    """How the store uses a volume; `reason` says why in a few words."""

    kind: Kind
    mode: VolumeMode
    reason: str
    capabilities: Capabilities


def use_of(layout: Layout, settings: Settings) -> Use:
    """How this process uses its volume. The first call of a host tries it, which writes to the volume, unless no trial
    could make its mode full.

    Raises RootUnusable if nothing can be written for another reason than a read-only mount.
    """
    kind = _kind(layout.root)
    if settings.volume_mode is not None or kind.place in ("bucket", "unknown"):
        return use_from(layout, settings, Capabilities())
    if is_mounted_read_only(layout.root):
        return Use(kind, "read-only", "it is mounted read-only", Capabilities())
    try:
        return use_from(layout, settings, _cached(layout))
    except NoSpace:  # what takes room will say so; what frees some must go on
        return Use(kind, "full", "it is full, and could not be tried", Capabilities())


def use_from(layout: Layout, settings: Settings, capabilities: Capabilities) -> Use:
    """The same for capabilities that are known already."""
    use = decided_by(_kind(layout.root), capabilities)
    if settings.volume_mode is None:
        return use
    return replace(use, mode=settings.volume_mode, reason="as MODELSTORE_VOLUME says")


def check_may_change(layout: Layout, settings: Settings) -> None:
    """Raise ReadOnlyVolume if the store must not change this volume."""
    use = use_of(layout, settings)
    if use.mode == "full":
        return
    if is_mounted_read_only(layout.root):
        raise ReadOnlyVolume(
            f"cannot write {layout.root}: it is mounted read-only (Read-only file system); mount the volume writable, "
            "or set MODELSTORE_ROOT"
        )
    if settings.volume_mode is not None:
        raise ReadOnlyVolume(
            f"{layout.root} is not changed, as MODELSTORE_VOLUME=read-only says: unset it to store models"
        )
    raise ReadOnlyVolume(
        f"{layout.root} is {use.kind.name}, used read-only because {use.reason}: fill it with `modelstore seed REF "
        "--to s3://VOLUME@DATACENTER`, let MODELSTORE_ROOT name a network volume, or see `modelstore doctor`; if no "
        "other host uses it, set MODELSTORE_VOLUME=full"
    )


def may_change(layout: Layout, settings: Settings) -> bool:
    """Whether the store may change this volume; False if that cannot be found out."""
    try:
        return use_of(layout, settings).mode == "full"
    except (ModelStoreError, OSError):
        return False


def is_mounted_read_only(root: Path) -> bool:
    """Whether the file system of this folder, or of the nearest one above that is there, takes no writes."""
    try:
        return bool(os.statvfs(_existing(root)).f_flag & os.ST_RDONLY)
    except (ModelStoreError, OSError):
        return False


def decided_by(kind: Kind, capabilities: Capabilities) -> Use:
    """The use that follows from what a volume can do, and from nothing else."""
    answers = [(name, getattr(capabilities, name)) for name, meaning in MEANINGS.items() if meaning.is_needed]
    for answer, phrase in (("no", "it is not so that {}"), ("unproven", "it is not proven that {}")):
        if lacking := [name for name, value in answers if value == answer]:
            note = capabilities.notes.get(lacking[0], "")
            reason = phrase.format(MEANINGS[lacking[0]].text) + (f" ({note})" if note else "")
            return Use(kind, "read-only", reason, capabilities)
    return Use(kind, "full", "it can do what the store needs", capabilities)


def _kind(root: Path) -> Kind:
    return kind_of(mount_of(Path(os.path.realpath(_existing(root))), read_mounts()))


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above that is there. Raises RootUnusable if it is none, or that cannot be told."""
    nearest = next(folder for folder in (path, *path.parents) if tree.exists(folder))
    if not nearest.is_dir():
        raise RootUnusable(f"cannot write {path}: {nearest} is no folder; mount the volume, or set MODELSTORE_ROOT")
    return nearest


def _cached(layout: Layout) -> Capabilities:
    """The capabilities as a process of this host has found them for this mount, or finds them now."""
    existing = Path(os.path.realpath(_existing(layout.root)))
    mount = mount_of(existing, read_mounts())
    with durable.mapped_errors(existing):
        identity = repr((mount, existing.stat().st_dev, _boot(), _VERSION))
    return _known(layout, identity)


@cache
def _known(layout: Layout, identity: str) -> Capabilities:
    record: Path | None = None
    with suppress(ModelStoreError, OSError):
        folder = runtime_folder() / "volumes"
        folder.mkdir(mode=0o700, exist_ok=True)
        record = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        with suppress(ValueError, TypeError):
            return Capabilities(**json.loads(record.read_bytes()))
    capabilities = _probed(layout)
    if record is not None and not _lacks(capabilities):  # a fault may pass; it is tried again
        with suppress(OSError):
            temporary = record.with_name(f".{secrets.token_hex(8)}")
            temporary.write_text(json.dumps(asdict(capabilities)))
            temporary.rename(record)
    return capabilities


def _probed(layout: Layout) -> Capabilities:
    """A trial, and a second one if the first one lacks anything: its folder may have been removed meanwhile."""
    try:
        capabilities = probe(layout)
    except FileNotFoundError:
        capabilities = None
    if capabilities is None or _lacks(capabilities):
        try:
            capabilities = probe(layout)
        except FileNotFoundError as error:
            raise tree.unreadable(error, layout.trash) from error
    return capabilities


def _lacks(capabilities: Capabilities) -> bool:
    """Whether something that the mode full rests on is not there."""
    return any(getattr(capabilities, name) == "no" for name, meaning in MEANINGS.items() if meaning.is_needed)


def _boot() -> str:
    """Of this boot of the host: a mount's numbers are used again after it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def probe(layout: Layout, other_root: Path | None = None) -> Capabilities:
    """Try the volume, in a folder that is removed again. `other_root`: the store's root on another mount of the same
    volume, as another host would have it.

    Raises NoSpace and RootUnusable if nothing can be written, ReadOnlyVolume if the other mount shows another volume.
    """
    with probe_folder(layout) as folder:
        other = folder if other_root is None else other_root / folder.relative_to(layout.root)
        kind = _kind(layout.root)
        findings = trials.on_one_mount(folder)
        if other_root is not None:
            findings |= trials.on_two_mounts(folder, other)
        elif kind.place in ("bucket", "unknown"):
            for name in _ACROSS_HOSTS:
                if findings.get(name, ("yes", ""))[0] == "yes":
                    findings[name] = ("unproven", "")
        else:
            basis = (
                "on this host alone" if kind.place == "host" else f"between hosts as known of {kind.name}, not tried"
            )
            known = [name for name in _ACROSS_HOSTS if findings.get(name, ("yes", ""))[0] == "yes"]
            findings |= dict.fromkeys(known, ("yes", basis))
    answers: Mapping[str, Answer] = {name: answer for name, (answer, _note) in findings.items()}
    return Capabilities(**answers, notes={name: note for name, (_answer, note) in findings.items() if note})


@contextmanager
def probe_folder(layout: Layout) -> Iterator[Path]:
    """A folder in the store's trash, which is removed in the end, or by gc if this process is killed."""
    folder = layout.trash / f"doctor-{secrets.token_hex(4)}"
    tree.check_no_links(layout.root, folder)
    durable.make_folder(folder)
    try:
        yield folder
    finally:
        try:
            durable.remove_tree(folder)
        except (ModelStoreError, OSError) as error:  # says nothing of the results
            logger.warning("%s stays until the next gc: %s", folder, error)
