"""`modelstore doctor`: whether a fleet can rely on this volume, and the obstacles.

Each result gives the observation, its consequence, and the remedy. What could not be tried is never said to be well.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelstore.errors import FormatTooNew, ModelStoreError, NoSpace, ReadOnlyVolume, RootUnusable, SnapshotNotFound
from modelstore.fill.sources import sources_for
from modelstore.mount import check_place, kind_of, mount_of, read_mounts
from modelstore.operate import inventory
from modelstore.operate.compression import estimate
from modelstore.processors import processors
from modelstore.reference import Reference, parse_reference
from modelstore.settings import Settings
from modelstore.units import counted, size
from modelstore.volume import aliases, durable, refs
from modelstore.volume.capabilities import MEANINGS, Use, decided_by, probe, probe_folder, use_from
from modelstore.volume.content import has_decoder
from modelstore.volume.garbage import plan_collection
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.preferred_form import prefers_compressed, record_rate
from modelstore.volume.snapshots import Catalog
from modelstore.volume.unfinished import unfinished
from modelstore.volume.verify import known_problem

logger = logging.getLogger(__name__)

Level = Literal["ok", "warning", "error"]
PROBE_BYTES = 64 << 20
_SLOW_BYTES_PER_S = 100e6
_CLOCK_OFF_S = 60.0
_WORTH_COMPRESSING = 32 << 20  # bytes: a smaller model is read in no time
_UNCOUNTED = ("the snapshots cannot be counted", "see above, or check the mount")
_LOCAL_LOCKS = ("mfsnobsdlocks", "nolock", "local_lock=all", "local_lock=flock")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was looked at; `exit_code` is that of the error which it would lead to."""

    check: str
    level: Level
    what: str
    why: str = ""
    do: str = ""
    exit_code: int = 0


Check = Callable[[], CheckResult]


def diagnose(
    settings: Settings, *, peer: Path | None = None, reference: str | None = None, probe_bytes: int = PROBE_BYTES
) -> Iterator[CheckResult]:
    """Look at one thing after another. `peer`: the store's root on another mount of the same volume. `reference`: a
    model that shall be within reach."""
    layout = Layout(settings.root)
    try:
        check_place(settings.root)
    except RootUnusable as error:
        yield _error("mount", str(error), "the store has no place", "see above")
        return
    yield _mounted(settings.root)
    store = _format(layout)
    yield store
    if store.level == "error":
        return
    yield from _probed(layout, settings, peer, probe_bytes)
    yield _quota(layout, settings)
    yield from _contents(layout)
    yield _leftovers(layout, settings)
    yield from _hub(settings)
    if reference is not None:
        yield _access(layout, settings, reference)


def exit_code(findings: list[CheckResult]) -> int:
    """0 if nothing is worse than a warning, else the code of the first error."""
    return next((finding.exit_code or 1 for finding in findings if finding.level == "error"), 0)


def _ok(check: str, text: str) -> CheckResult:
    return CheckResult(check, "ok", text)


def _warning(check: str, text: str, why: str, do: str) -> CheckResult:
    return CheckResult(check, "warning", text, why, do)


def _error(check: str, text: str, why: str, do: str, code: int = 1) -> CheckResult:
    return CheckResult(check, "error", text, why, do, code)


def _failed(check: str, error: ModelStoreError | OSError, why: str, do: str) -> CheckResult:
    return _error(check, str(error), why, do, error.exit_code if isinstance(error, ModelStoreError) else 1)


def _mounted(root: Path) -> CheckResult:
    """By the mount table: RunPod's cached models make `/runpod-volume` a folder without a volume."""
    mount = mount_of(root, read_mounts())
    if mount is None:
        return _warning("mount", "this system has no mount table", "whether a volume is there cannot be told", "go on")
    kind = kind_of(mount)
    text = f"{root} is on {mount.device}, {kind.name}, mounted at {mount.point}"
    if "ro" in mount.options:
        return _error("mount", f"{text}, read-only", "nothing can be published", "mount it for writing")
    if kind.place == "host":
        return _warning(
            "mount", text, "this is no network volume: other workers do not see it",
            "attach the volume to the endpoint, or set MODELSTORE_ROOT to a folder on it",
        )  # fmt: skip
    if local := [option for option in mount.options if option in _LOCAL_LOCKS]:
        return _warning(
            "mount", f"{text}, with {', '.join(local)}", "locks hold on one host only: a dead worker shows later",
            "nothing, if the fleet may wait for the heartbeat; else mount it without that option",
        )  # fmt: skip
    return _ok("mount", text)


def _format(layout: Layout) -> CheckResult:
    try:
        refs.check_format(layout)
    except FormatTooNew as error:
        return _failed("format", error, "this version would misread it", "upgrade modelstore")
    except ModelStoreError as error:
        return _failed("format", error, "nothing can be found there", "check the mount")
    is_store = layout.format_file.exists()
    return _ok("format", "the store's format is known" if is_store else "no store yet: the first download makes it")


def _probed(layout: Layout, settings: Settings, peer: Path | None, probe_bytes: int) -> Iterator[CheckResult]:
    """The checks by trial; the first refusal of the volume ends them."""
    try:
        yield from _capabilities(layout, settings, peer)
        with probe_folder(layout) as folder:
            yield _clock(folder)
            wrote, read = _measure_rates(folder, probe_bytes)
        yield _judge_rate("write rate", wrote, probe_bytes)
        yield _judge_rate("read rate", read, probe_bytes)
        if settings.volume_mode != "read-only":
            record_rate(layout, read)
        yield from _compression(layout, settings, read)
    except NoSpace as error:
        yield _failed("space", error, "no model can be published", "remove one, or run gc")
    except FileNotFoundError:
        text = "the doctor's folder is gone: a download that needed room has emptied the trash"
        yield _warning("write", text, "the rest was not tried", "run it again")
    except (ModelStoreError, OSError) as error:
        yield _failed("write", error, "nothing can be published", "check MODELSTORE_ROOT and the mount")


def _capabilities(layout: Layout, settings: Settings, peer: Path | None) -> Iterator[CheckResult]:
    """What the volume can do, a line for each, and the mode that follows."""
    try:
        capabilities = probe(layout, peer)
    except ReadOnlyVolume as error:
        yield _failed("peer", error, "--peer is another volume", "mount the same volume there")
        capabilities, peer = probe(layout), None
    kind = use_from(layout, settings, capabilities).kind
    for name, meaning in MEANINGS.items():
        answer, note = getattr(capabilities, name), capabilities.notes.get(name, "")
        text = f"{meaning.text}{f' ({note})' if note else ''}"
        check = name.replace("_", " ")
        if answer == "yes":
            yield _ok(check, text)
        elif answer == "no":
            is_fault = meaning.is_needed and kind.place in ("host", "network")
            report = _error if is_fault else _warning
            yield report(check, f"it is not so that {text}", meaning.without, meaning.remedy)
        else:
            yield _warning(
                check, f"not proven: {text}", "one mount cannot show what another host sees",
                "run it with --peer PATH, the store's folder on another mount of this volume",
            )  # fmt: skip
    yield _mode(use_from(layout, settings, capabilities), settings, has_peer=peer is not None)


def _mode(use: Use, settings: Settings, *, has_peer: bool) -> CheckResult:
    decided = decided_by(use.kind, use.capabilities)
    if settings.volume_mode == "full" and decided.mode != "full":
        return _warning(
            "mode", "full, as MODELSTORE_VOLUME says", decided.reason, "unset it, unless you know this volume better"
        )
    if use.mode == "full" and use.kind.place == "unknown" and has_peer:
        return _warning(
            "mode", "what a store needs is proven between these two mounts", "one mount alone cannot know that",
            "set MODELSTORE_VOLUME=full on every host",
        )  # fmt: skip
    if use.mode == "full":
        return _ok("mode", f"full: {use.reason}")
    return _warning(
        "mode", f"read-only: {use.reason}", "published models are served, and nothing is stored or removed here",
        "fill it with `modelstore seed REF --to s3://VOLUME@DATACENTER`, or use a network volume",
    )  # fmt: skip


def _clock(folder: Path) -> CheckResult:
    off = time.time() - durable.touch(folder / "clock")
    if abs(off) > _CLOCK_OFF_S:
        text = f"this host's clock is {off:+.0f} s off the volume's"
        return _warning("clock", text, "times in the history are wrong; nothing else relies on it", "set the clock")
    return _ok("clock", f"within {max(abs(off), 1):.0f} s of the volume's")


def _measure_rates(folder: Path, probe_bytes: int) -> tuple[float, float]:
    """Write and read once, past this host's cache if the file system allows it; bytes a second."""
    path, block = folder / "rate", os.urandom(1 << 20)
    began = time.monotonic()
    fd = durable.open_for_write(path)
    try:
        for offset in range(0, probe_bytes, len(block)):
            durable.write_at(fd, block, offset, path=path)
        durable.sync(fd, path=path)
    finally:
        durable.close(fd, path=path)
    wrote = probe_bytes / (time.monotonic() - began)
    with durable.opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        while os.read(fd, 8 << 20):
            pass
        read = probe_bytes / (time.monotonic() - began)
    return wrote, read


def _judge_rate(name: str, rate: float, probe_bytes: int) -> CheckResult:
    if rate < _SLOW_BYTES_PER_S:
        minutes = 16e9 / rate / 60
        why = f"a model of 16 GB takes {minutes:.0f} minutes"
        return _warning(name, f"{rate / 1e6:.0f} MB/s", why, "ask whether the volume is under load, try again")
    return _ok(name, f"{rate / 1e6:.0f} MB/s over {probe_bytes / 1e6:.0f} MB")


def _compression(layout: Layout, settings: Settings, bytes_per_s: float) -> Iterator[CheckResult]:
    """The form that `auto` chooses, and whether the largest plain model would start sooner if it were compressed, at
    this rate and on this host."""
    if settings.compress == "auto":
        form = "compressed" if prefers_compressed(layout, "auto") else "plain"
        count = counted(processors(), "processor")
        yield _ok("new weights", f"MODELSTORE_COMPRESS=auto stores them {form} at this read rate, with {count}")
    try:
        plain = [each for each in Catalog(layout).snapshots() if not each.key.compressed and each.weights_bytes]
        largest = max(plain, key=lambda snapshot: snapshot.weights_bytes, default=None)
        if largest is None or largest.weights_bytes < _WORTH_COMPRESSING or not has_decoder():
            return
        yield _ok("compression", estimate(largest, bytes_per_s, processors=processors()).text)
    except (ModelStoreError, OSError) as error:
        logger.debug("compression is not judged: %s", error)


def _quota(layout: Layout, settings: Settings) -> CheckResult:
    try:
        usage = inventory.space(layout, settings)
    except (ModelStoreError, OSError) as error:
        return _failed("quota", error, *_UNCOUNTED)
    taken = f"the store takes {size(usage['taken'])}"
    if usage["quota"] is None:
        return _warning(
            "quota", f"{taken}, without a quota", "the volume's own limit shows in the middle of a download",
            "set MODELSTORE_QUOTA to a little less than the volume's size",
        )  # fmt: skip
    free = f"{taken} of {size(usage['quota'])}"
    do = f"evict ({size(usage['evictable'])} may go): `modelstore gc --to …`, or raise the quota"
    if usage["taken"] > usage["quota"]:
        return _warning("quota", f"{free}, which is exceeded", "no further model can be published", do)
    if usage["free"] < usage["quota"] / 20:
        return _warning("quota", free, "the next model may not fit", do)
    return _ok("quota", free)


def _contents(layout: Layout) -> Iterator[CheckResult]:
    """Damaged snapshots, and aliases that point to none."""
    try:
        models = inventory.models(layout)
        targets = aliases.targets(layout).known
    except (ModelStoreError, OSError) as error:
        yield _failed("snapshots", error, *_UNCOUNTED)
        return
    incomplete = [record["repo_id"] for record in models if not record["complete"]]
    if incomplete:
        yield _error(
            "snapshots", f"{len(incomplete)} of them lack files or a manifest: {', '.join(incomplete[:3])}",
            "a worker downloads them again", "run `modelstore verify`, then seed them again", 5,
        )  # fmt: skip
    if bad := [record for record in models if record["complete"] and record["problem"]]:
        names = ", ".join(f"{record['repo_id']} ({record['problem']})" for record in bad[:3])
        yield _error(
            "snapshots", f"verify found damage in {counted(len(bad), 'model')}: {names}",
            "the next start makes it again, which takes the network", "seed it now", 5,
        )  # fmt: skip
    if missing := [(name, key) for key, names in targets.items() for name in names if not _is_there(layout, key)]:
        text = ", ".join(f"@{name} points to {key}" for name, key in missing[:3])
        yield _warning(
            "aliases", f"{text}, not on the volume", "the next start of it downloads",
            f"run `modelstore seed @{missing[0][0]}`",
        )  # fmt: skip


def _is_there(layout: Layout, key: SnapshotKey) -> bool:
    """Whether a snapshot with these weights is there, plain or compressed."""
    return layout.snapshot(key).is_dir() or layout.snapshot(key.twin).is_dir()


def _leftovers(layout: Layout, settings: Settings) -> CheckResult:
    try:
        plan = plan_collection(layout, settings)
    except (ModelStoreError, OSError) as error:
        return _failed("leftovers", error, *_UNCOUNTED)
    if plan.garbage:
        text = f"{len(plan.garbage)} leftovers, {size(sum(item.size_bytes for item in plan.garbage))}"
        return _warning("leftovers", text, "they take space", "run `modelstore gc`")
    downloads = [each for each in unfinished(layout) if not each.is_running]
    if downloads:
        text = counted(len(downloads), "unfinished download")
        text += f", {size(sum(each.size_bytes for each in downloads))}"
        return _warning(
            "leftovers", text, "they take space, and go on with the next seed or start of the model",
            "seed it to the end, or run `modelstore rm --unfinished`",
        )  # fmt: skip
    return _ok("leftovers", "no leftovers")


def _hub(settings: Settings) -> Iterator[CheckResult]:
    if settings.offline:
        yield _ok("hub", "MODELSTORE_OFFLINE is set: it is never asked")
        return
    from modelstore.fill.hub import check_token

    if settings.hf_token is None:
        yield CheckResult("token", "ok", "HF_TOKEN is not set: public models alone")
    else:
        try:
            yield _ok("token", f"HF_TOKEN belongs to {check_token(settings)}")
        except ModelStoreError as error:
            yield _failed("token", error, "gated and private models are refused", "set another")


def _access(layout: Layout, settings: Settings, reference: str) -> CheckResult:
    """Whether a worker that is told to serve `reference` comes by it, in the order in which it looks: published, a
    folder, an HF cache on the volume, the Hub."""
    try:
        parsed = parse_reference(reference)
        snapshot = Catalog.of(settings).find(parsed, settings.dtype)
        if snapshot is not None and (problem := known_problem(layout, snapshot.key)):
            text = f"{reference} is published, {snapshot.key}, and damaged: {problem}"
            return _warning("access", text, "the start makes it again, which takes the network", "seed it")
        if snapshot is not None:
            return _ok("access", f"{reference} is published, {snapshot.key}: a start needs no network")
        if parsed.kind == "alias":  # its snapshot was evicted, and is made again
            key = aliases.target(layout, parsed.name)
            parsed = Reference("hub", key.repo_id, key.commit)
        phrase = next(filter(None, (source.reach() for source in sources_for(parsed, settings))), None)
        if phrase is None:
            as_variant = f" as {settings.dtype}" if settings.dtype else ""
            raise SnapshotNotFound(f"{reference} is not on the volume{as_variant}")
        return _ok("access", f"{reference} {phrase}")
    except ModelStoreError as error:
        return _failed("access", error, "a worker cannot serve it", "seed another, or see above")
    except OSError as error:
        return _failed("access", error, "a worker cannot serve it", "check the folder")
