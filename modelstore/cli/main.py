"""The `modelstore` command: parse, call the store, print. Progress and logs go to stderr, results to stdout.

With `--json` stdout carries one JSON document and nothing else. An error is one line; its exit code is the error's own
(see `errors.py`); a traceback only with `--debug`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from modelstore import __version__
from modelstore.cli import (
    adopt,  # noqa: F401  each registers its commands
    alias,
    fill,  # noqa: F401  each registers its commands
    inspect,  # noqa: F401  each registers its commands
)
from modelstore.cli.app import (
    DRY_RUN,
    DTYPE,
    REF,
    REVISION,
    YES,
    Context,
    app,
    command,
    observer_of,
    prepare_streams,
    print_collected,
    print_measured,
    print_snapshot,
    print_verified,
    without_status,
)
from modelstore.dtypes import parse_dtype
from modelstore.errors import NoSpace, NotFound, Refused, SnapshotNotFound, UsageError
from modelstore.reference import is_cut_commit, parse_reference
from modelstore.settings import parse_size
from modelstore.store import ModelStore
from modelstore.units import size
from modelstore.volume import (
    aliases,
    pins,
    refs,
)
from modelstore.volume.evict import evict, survey
from modelstore.volume.garbage import GRACE_S, plan
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.refs import repo_id_of
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.space import Space
from modelstore.volume.verify import parse_sample, save_position, saved_position, verify_folder

app.add_typer(alias.app, name="alias", rich_help_panel=None)

# As `--help` lists them: fill, start, look, ask why, keep and take away; then `alias` with its own.
ORDER = (
    *("seed", "adopt", "export"),
    *("warm", "bench"),
    *("ls", "show", "path", "du", "claims", "watch"),
    *("history", "report", "metrics", "doctor", "verify"),
    *("rm", "gc", "pin", "unpin"),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modelstore {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A shared model store on a network volume: seed it, look at it, start from it."""


@command(app)
def warm(
    context: Context,
    reference: REF,
    dtype: DTYPE = None,
    revision: REVISION = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda or cpu; cuda where there is one.")] = None,
) -> None:
    """Load a model as a worker would, and print the timeline."""
    from modelstore.startup import without_collecting
    from modelstore.warmstart import begin

    changes: dict[str, Any] = {"model": parse_reference(reference, revision=revision)}
    if dtype is not None:
        changes["dtype"] = parse_dtype("--dtype", dtype)
    store = context.store(**changes)
    with without_collecting():
        with observer_of(context) as observer:
            begun = begin(
                store.settings, observer=observer, meanwhile=lambda _reading: import_module("modelstore.load.model")
            )
        with begun.timeline.span("import", "transformers"):
            try:
                from modelstore.load.model import load_model
            except ModuleNotFoundError as error:
                raise NotFound(f"{error.name} is not installed: pip install 'runpod-modelstore[worker]'") from error
        begun.load(
            lambda b: load_model(
                b.snapshot,
                device,
                reading=b.reading,
                timeline=b.timeline,
                trust_remote_code=b.trusted,
            )
        )
    begun.timeline.mark("ready")
    begun.in_use.end()
    context.print(begun.timeline.as_json(), lambda console: console.print(begun.timeline.waterfall()))


@command(app, "bench")
def bench_volume(
    context: Context,
    size: Annotated[str, typer.Option("--size", help="Of the model, in 16 bits; seven times that is needed.")] = "1GB",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Of each contender, in turn.")] = 5,
    device: Annotated[str | None, typer.Option("--device", help="cuda or cpu; cuda where there is one.")] = None,
    folder: Annotated[Path | None, typer.Option("--folder", help="On the volume to measure; beside the store.")] = None,
) -> None:
    """Measure loading and starting on a volume, beside other loaders."""
    size_bytes = parse_size("--size", size)
    place = (folder or context.store().settings.root.parent).absolute()
    try:
        from modelstore.bench.race import bench_volume, environment
        from modelstore.load.tensors import usable_device
    except ModuleNotFoundError as error:
        raise NotFound(f"{error.name} is not installed: pip install 'runpod-modelstore[worker,bench]'") from error
    target = str(usable_device(device))
    results = bench_volume(place, size_bytes=size_bytes, runs=runs, device=target, report=context.report)
    record = {
        "environment": environment(place),
        "bytes": size_bytes,
        "runs": runs,
        "device": target,
        "results": {name: [row.as_json() for row in rows] for name, rows in results.items()},
    }
    context.print(record, lambda console: print_measured(console, record))


@command(app)
def show(
    context: Context,
    reference: REF,
    dtype: DTYPE = None,
    revision: REVISION = None,
) -> None:
    """Show one snapshot: its files, sizes and digests, and its source."""
    snapshot = _found(context.store(), reference, revision, dtype)
    source = snapshot.manifest.source
    record = without_status(snapshot) | {
        "created_at": snapshot.manifest.created_at,
        "source": source.as_json(),
        "stored_unchanged": snapshot.manifest.stored_unchanged,
        "file_list": [
            {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256} for file in snapshot.manifest.files
        ],
    }
    context.print(record, lambda console: print_snapshot(console, snapshot))


@command(app)
def path(
    context: Context,
    reference: REF,
    dtype: DTYPE = None,
    revision: REVISION = None,
) -> None:
    """Print the folder of a snapshot; touches no network."""
    snapshot = _found(context.store(), reference, revision, dtype)
    print(json.dumps({"path": str(snapshot.path)}) if context.json else snapshot.path)


@command(app)
def verify(
    context: Context,
    reference: Annotated[str | None, typer.Argument(metavar="[REF]", help="One model; all without it.")] = None,
    sample: Annotated[
        str | None, typer.Option("--sample", help="Compare a part, as in 1/20; the next run takes the next part.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop after that long; the next run goes on from there.")
    ] = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
) -> None:
    """Compare snapshots with their manifests, byte by byte. All of them without REF; touches no network."""
    store = context.store() if reference else context.volume()
    stride = parse_sample(sample) if sample is not None else 1
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError("--max-seconds must be a number above 0")
    in_parts = sample is not None or max_seconds is not None
    until = time.monotonic() + (max_seconds or float("inf"))
    keys = [_found_key(store, reference, revision, dtype)] if reference else list(store.catalog.keys())
    if in_parts:  # whatever was looked at longest ago comes first
        keys.sort(key=lambda key: _mtime(store.layout.verified(key)))
    records = [_verify(store, key, stride, until, in_parts=in_parts) for key in keys]
    if not reference:  # what was evicted since the store was listed is not damaged
        records = [record for record in records if record["ok"] or Path(record["path"]).exists()]
    context.print(records, lambda console: print_verified(console, records))
    raise typer.Exit(0 if all(record["ok"] for record in records) else 5)


@command(app, "rm")
def remove(
    context: Context,
    reference: REF,
    dtype: DTYPE = None,
    revision: REVISION = None,
    dry_run: DRY_RUN = False,
    yes: YES = False,
    force: Annotated[bool, typer.Option("--force", help="Also where it is pinned, or an alias points to it.")] = False,
) -> None:
    """Remove one snapshot from the volume. A worker that is reading it is not hurt."""
    store = context.store()
    key = _found_key(store, reference, revision, dtype)
    (found,), folder = survey(store.layout, [key]), store.layout.snapshot(key)
    if found.pinned and not force:
        raise Refused(f"{key} is pinned: run `modelstore unpin {reference}` first, or add --force")
    if found.aliases and not force:
        raise Refused(f"@{found.aliases[0]} points to {key}: repoint it first, or add --force")
    users = f", in use by {', '.join(found.users)}" if found.users else ""
    if not dry_run:
        context.confirm(f"remove {key}, {size(found.size_bytes)}, {folder}{users}", yes=yes)
        if not evict(store.layout, key, force=True):
            raise Refused(f"{key} is being removed by somebody else: look at `modelstore ls`")
    record = _key_record(key, folder) | {"bytes": found.size_bytes, "removed": not dry_run}
    context.print(record, lambda console: console.print(f"{'would remove' if dry_run else 'removed'} {folder}"))


@command(app, "gc")
def collect_garbage(
    context: Context,
    to: Annotated[
        str | None, typer.Option("--to", help="Also evict the least recently used until the store takes this, as 50GB.")
    ] = None,
    grace_s: Annotated[float, typer.Option("--grace-s", help="Leave alone what is younger.")] = GRACE_S,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Remove abandoned downloads, trash and quarantine. With --to also the models that were not used for longest."""
    store = context.volume()
    layout, settings = store.layout, store.settings
    limit = parse_size("--to", to) if to is not None else None
    if to is not None and to.strip().isdigit() and 0 < int(to) < 10**6:  # whoever writes 150 hardly means bytes
        raise UsageError(f"--to {to} has no unit: write it like {to}GB, or {to}B")
    if not grace_s >= settings.lease_s:
        raise UsageError(f"--grace-s must be at least the lease, {settings.lease_s:g} s")
    refs.check_format(store.layout)
    wanted = plan(layout, settings, grace_s=grace_s, limit_bytes=limit)
    if not dry_run and (wanted.garbage or wanted.evicted):
        what = f"leftovers: {len(wanted.garbage)}, models: {len(wanted.evicted)}, {size(wanted.size_bytes)} in all"
        context.confirm(f"remove {what}", yes=yes)
        wanted = wanted.run(layout, settings, grace_s=grace_s)
    record = {
        "bytes": wanted.size_bytes,
        "removed": not dry_run,
        "collected": [
            {
                "kind": item.kind,
                "path": str(item.path.relative_to(layout.root)),
                "bytes": item.size_bytes,
                "age_s": round(item.age_s),
            }
            for item in wanted.garbage
        ],
        "evicted": [
            _key_record(item.key, layout.snapshot(item.key)) | {"bytes": item.size_bytes, "idle_s": round(item.idle_s)}
            for item in wanted.evicted
        ],
    }
    context.print(record, lambda console: print_collected(console, record))
    if limit is None:
        return
    taken = Space(layout, settings).taken() - (wanted.size_bytes if dry_run else 0)
    if taken > limit:
        raise NoSpace(
            f"{layout.root} takes {size(taken)} then, more than {to}: the rest is in use, pinned or an alias's"
        )


@command(app)
def pin(
    context: Context,
    reference: REF,
    dtype: DTYPE = None,
    revision: REVISION = None,
) -> None:
    """Keep a snapshot from eviction, whatever the quota says."""
    store = context.store()
    key = _found(store, reference, revision, dtype).key
    pins.pin(store.layout, key, store.settings.worker_id)
    record = _key_record(key, store.layout.snapshot(key)) | {"pinned": True}
    context.print(record, lambda console: console.print(f"pinned {key}"))


@command(app)
def unpin(
    context: Context,
    reference: REF,
    dtype: DTYPE = None,
    revision: REVISION = None,
) -> None:
    """Let a snapshot be evicted again."""
    store = context.store()
    key = _found_key(store, reference, revision, dtype)
    was_pinned = pins.unpin(store.layout, key)
    record = _key_record(key, store.layout.snapshot(key)) | {"pinned": False}
    text = f"unpinned {key}" if was_pinned else f"{key} was not pinned"
    others = sorted(f"{one}" for one in pins.pinned(store.layout) if one.repo_id == key.repo_id)
    text += f"; {' and '.join(others)} still is" if others else ""
    context.print(record, lambda console: console.print(text))


def run() -> NoReturn:
    """Do what the command line says, and end the process."""
    prepare_streams()
    app.registered_commands.sort(key=lambda one: ORDER.index(str(one.name)))
    app(standalone_mode=True)
    raise SystemExit(0)


def _verify(store: ModelStore, key: SnapshotKey, stride: int, until: float, *, in_parts: bool) -> dict[str, Any]:
    """One snapshot's record; a verification in parts goes on where the last one stopped, and keeps where it came to."""
    folder = store.layout.snapshot(key)
    if in_parts:
        found = verify_folder(
            folder,
            key,
            saved_position(store.layout, key, stride),
            until=until,
            on_position=lambda position: save_position(store.layout, key, position),
        )
        save_position(store.layout, key, found.position)
    else:
        found = verify_folder(folder, key)
    return _key_record(key, folder) | {
        "ok": found.ok,
        "complete": found.complete,
        "compared_bytes": found.compared,
        "planned_bytes": found.planned,
        "findings": [asdict(finding) for finding in found.findings],
    }


def _mtime(path: Path) -> float:
    return path.lstat().st_mtime if path.exists() else 0.0


def _key_record(key: SnapshotKey, folder: Path) -> dict[str, Any]:
    return {**key.as_json(), "path": str(folder)}


def _found_key(store: ModelStore, reference: str, revision: str | None, dtype: str | None) -> SnapshotKey:
    """What stands where the snapshot belongs, damaged or not; a commit may be cut, as `ls` shows it."""
    wanted = parse_reference(reference, revision=revision)
    variant = parse_dtype("--dtype", dtype) if dtype else store.settings.dtype
    if (key := store.catalog.find_key(wanted, variant)) is not None:
        return key
    if wanted.kind == "alias":
        key = aliases.target(store.layout, wanted.name)
        raise SnapshotNotFound(f"{wanted} points to {key}, which is not on the volume: run `modelstore seed {wanted}`")
    there = list(store.catalog.keys(repo_id_of(wanted)))
    if is_cut_commit(wanted.revision):
        meant = [key for key in there if key.commit.startswith(wanted.revision) and key.dtype == variant]
        if len(meant) == 1:
            return meant[0]
    what = f"{reference} is not in {store.settings.root} as {variant}"
    if there:
        others = ", ".join(f"{key.repo_id}@{key.commit[:12]} --dtype {key.dtype}" for key in there[:5])
        raise SnapshotNotFound(f"{what}, but this is: {others}")
    option = f" --dtype {dtype}" if dtype else ""
    raise SnapshotNotFound(f"{what}: look at `modelstore ls`, or run `modelstore seed {reference}{option}`")


def _found(store: ModelStore, reference: str, revision: str | None, dtype: str | None) -> Snapshot:
    key = _found_key(store, reference, revision, dtype)
    if (snapshot := store.catalog.published(key)) is None:
        what = "is damaged" if store.layout.snapshot(key).is_dir() else "is not there any more"
        raise SnapshotNotFound(f"{key} {what}: run `modelstore seed` for it again")
    return snapshot
