"""`modelstore seed`: publish models before any worker needs them, by name or from a list."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from modelstore.cli.app import (
    DTYPE,
    INTERRUPTED,
    REVISION,
    YES,
    Context,
    app,
    command,
    observer_of,
    print_seeded,
    report_error,
    table,
)
from modelstore.dtypes import OVERFLOWS, parse_dtype
from modelstore.errors import ModelStoreError, UsageError
from modelstore.fill.observer import Observer
from modelstore.fill.progress import Progress
from modelstore.mount import check_place
from modelstore.operate import inventory
from modelstore.operate.seed_list import Wanted, read_list
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.units import size
from modelstore.volume import aliases, pins
from modelstore.volume.claim import Holder
from modelstore.volume.evict import evict, survey
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.manifest import FileRecord
from modelstore.volume.refs import revision_of

if TYPE_CHECKING:
    from rich.console import Console

    from modelstore.fill.upload import Target, Volume

logger = logging.getLogger(__name__)

R = TypeVar("R")
_STOPS_WITHIN_S = 2.0


@command(app)
def seed(
    context: Context,
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[REF...]", help="org/name, org/name@revision or file:///folder")
    ] = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    overflow: Annotated[
        str, typer.Option("--overflow", help="What to do if a weight does not fit float16: stop, or store bfloat16.")
    ] = "stop",
    listed: Annotated[
        Path | None,
        typer.Option("--from", help="A TOML file of [[model]] tables: reference, dtype, overflow, aliases, pin."),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="With --from: then remove what the list does not name.")
    ] = False,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=16, help="Models at once.")] = 2,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Convert weights that there are only as pickles.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Store a repo's own code too, if REF names its commit in full.")
    ] = False,
    wait_s: Annotated[float | None, typer.Option("--wait-s", help="Seconds to wait for another's download.")] = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="Then upload to s3://VOLUME@DATACENTER; several times for several volumes."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="With --to: read all of it back and compare.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and what each would take, and leave it.")
    ] = False,
    yes: YES = False,
) -> None:
    """Publish models before any worker needs them. Fetches only what is missing."""
    if overflow not in OVERFLOWS:
        raise typer.BadParameter(f"use {' or '.join(OVERFLOWS)}", param_hint="--overflow")
    if wait_s is not None and not wait_s >= 0:
        raise UsageError("--wait-s must be a number of seconds, at least 0")
    if prune and listed is None:
        raise UsageError("--prune makes the volume equal a list: name it with --from")
    targets = _targets(to) if to else []
    if prune and targets:
        raise UsageError("--prune removes from the volume that is mounted, and --to fills others: use one of them")
    if listed is not None and not references and (dtype or revision or overflow != "stop"):
        raise UsageError("--dtype, --revision and --overflow are for models named here: write them into the list")
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    store = context.store(**{name: True for name, wanted in allowed.items() if wanted})
    shared = Wanted(parse_reference("any/model"), parse_dtype("--dtype", dtype) if dtype else None)
    shared = replace(shared, overflow=overflow)
    models = [replace(shared, reference=parse_reference(text, revision=revision)) for text in references or ()]
    models += read_list(listed) if listed is not None else ()
    if not models:
        raise UsageError("REF is missing: name a model, as in `modelstore seed org/name`, or a list with --from")
    volumes = _volumes(targets, store.settings) if not dry_run else []
    if dry_run:
        check_place(store.settings.root)
        _preview(context, store, models, prune=prune)
        return
    # Asked before the hours of a download, not after.
    if prune:
        context.confirm(f"remove from {store.settings.root} what {listed} does not name", yes=yes)
    named = [wanted for wanted in models if any(aliases.history(store.layout, name) for name in wanted.aliases)]
    if moved := _moved_aliases(store, named, [_previewed(store, wanted) for wanted in named]):
        context.confirm(f"point {', '.join(f'@{name}' for name in moved)} to what {listed} says", yes=yes)
    records: list[dict[str, Any]] = []
    with observer_of(context, len(models)) as shown:
        observer = _Stoppable(shown)

        def one(wanted: Wanted) -> dict[str, Any] | ModelStoreError:
            try:
                snapshot = store.ensure(
                    wanted.reference,
                    dtype=wanted.dtype,
                    refresh=True,
                    overflow=wanted.overflow,
                    wait_s=wait_s,
                    observer=observer,
                )
                _name(store, wanted, snapshot.key)
                return snapshot.as_json()
            except ModelStoreError as error:
                if len(models) > 1:  # said now, not after the hours that the others take
                    report_error(error, context)
                return error

        done = _each(one, models, parallel, observer)
    worst = 0
    for wanted, result in zip(models, done, strict=True):
        if isinstance(result, ModelStoreError):
            if len(models) == 1:
                raise result
            worst = worst or result.exit_code
            records.append({"reference": str(wanted.reference), "error": str(result), "exit_code": result.exit_code})
        else:
            records.append(result)
    if prune and not worst:
        records += _pruned(store, {_key_of(record) for record in records})
    elif prune:
        logger.warning("nothing was removed, because not all of the list is there")
    if volumes:
        try:
            records, worst = _uploaded(context, store, volumes, models, records, worst, verify=verify)
        except KeyboardInterrupt:  # a part may be on its way for minutes: it ends with the process
            _end_at_once()
    single = len(records) == 1 and listed is None
    context.print(records[0] if single else records, lambda console: _print_done(console, records))
    raise typer.Exit(worst)


class _Stoppable(Observer):
    """Shows what another observer shows, and ends every download once it is told to."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def filling(self, key: SnapshotKey, progress: Progress) -> None:
        self._go_on()
        self._observer.filling(key, progress)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        self._go_on()
        self._observer.waiting(key, holder, left_s=left_s)

    def failed(self, key: SnapshotKey) -> None:
        self._observer.failed(key)

    def finished(self, key: SnapshotKey, folder: Path, record: FileRecord) -> None:
        self._observer.finished(key, folder, record)

    def _go_on(self) -> None:
        if self._stopped:
            raise KeyboardInterrupt


def _each(one: Callable[[Wanted], R], models: Sequence[Wanted], parallel: int, observer: _Stoppable) -> list[R]:
    """Seed several at once. Ctrl-C ends them all, those that hang in the network with the process."""
    if len(models) == 1 or parallel == 1:
        return [one(wanted) for wanted in models]
    pool = ThreadPoolExecutor(parallel)
    jobs = [pool.submit(one, wanted) for wanted in models]
    try:
        wait(jobs)
    except KeyboardInterrupt:
        observer.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        if wait(jobs, timeout=_STOPS_WITHIN_S).not_done:
            _end_at_once()
        raise
    return [job.result() for job in jobs]


def _end_at_once() -> NoReturn:
    """End without waiting for threads that hang in the network."""
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


def _targets(texts: Sequence[str]) -> list[Target]:
    from modelstore.fill.upload import parse_target  # most commands never need it

    return [parse_target(text) for text in texts]


def _volumes(targets: Sequence[Target], settings: Settings) -> list[Volume]:
    if not targets:
        return []
    from modelstore.fill.upload import Volume

    return [Volume(target, endpoint=settings.s3_endpoint) for target in targets]


def _uploaded(
    context: Context,
    store: ModelStore,
    volumes: Sequence[Volume],
    models: Sequence[Wanted],
    records: Sequence[dict[str, Any]],
    worst: int,
    *,
    verify: bool,
) -> tuple[list[dict[str, Any]], int]:
    """Upload what was seeded here to each volume; a record for each of the two, and the exit code."""
    said: list[dict[str, Any]] = [record for record in records if "error" in record]
    for wanted, record in zip(models, records, strict=True):
        if "error" in record:
            continue
        snapshot = store.catalog.published(_key_of(record))
        assert snapshot is not None
        for volume in volumes:
            try:
                with observer_of(context, doing="uploading") as observer:
                    sent = 0 if volume.has(snapshot) else volume.upload(snapshot, observer=observer)
                    if verify:
                        volume.verify(snapshot)
                    volume.record_commit(store.layout, snapshot, revision_of(wanted.reference))
                status = "uploaded" if sent else "present"
                said.append(volume.record(snapshot, sent=sent, status=status))
            except ModelStoreError as error:
                report_error(error, context)
                worst = worst or error.exit_code
                failed = volume.record(snapshot, sent=0, status="failed")
                said.append(failed | {"error": str(error), "exit_code": error.exit_code})
    return said, worst


def _name(store: ModelStore, wanted: Wanted, key: SnapshotKey) -> None:
    """Give a published model the aliases and the pin of the list."""
    for name in wanted.aliases:
        aliases.point(store.layout, name, key, store.settings.worker_id)
    if wanted.pin and not pins.is_pinned(store.layout, key):
        pins.pin(store.layout, key, "the list")


def _pruned(store: ModelStore, kept: set[SnapshotKey]) -> list[dict[str, Any]]:
    """Remove every other snapshot that nobody uses, and no pin or alias keeps."""
    records = []
    for candidate in survey(store.layout):
        if candidate.key in kept:
            continue
        key = candidate.key
        gone = not candidate.kept_because and evict(store.layout, key)
        if not gone:
            logger.warning("%s stays: %s", key, candidate.kept_because or "somebody began to use it")
        record = {**key.as_json(), "bytes": candidate.size_bytes}
        records.append(record | {"status": "removed" if gone else "kept"})
    return records


def _previewed(store: ModelStore, wanted: Wanted) -> dict[str, Any]:
    return store.preview(wanted.reference, dtype=wanted.dtype, overflow=wanted.overflow)


def _key_of(record: Mapping[str, Any]) -> SnapshotKey:
    return SnapshotKey(record["repo_id"], record["commit"], record["dtype"])


def _moved_aliases(store: ModelStore, models: Sequence[Wanted], previews: Sequence[Mapping[str, Any]]) -> list[str]:
    """The aliases that the list gives to another snapshot than they point to now, or a canary tries another for."""
    moved = []
    for wanted, preview in zip(models, previews, strict=True):
        for name in wanted.aliases:
            entries = aliases.history(store.layout, name)
            if entries and entries[-1].key != _key_of(preview):
                moved.append(name)
    return moved


def _preview(context: Context, store: ModelStore, models: list[Wanted], *, prune: bool) -> None:
    """Print what would be done, and what the volume would hold then; raises where one cannot be had."""
    records = [_previewed(store, wanted) for wanted in models]
    space = inventory.space(store.layout, store.settings)
    named = {_key_of(record): record for record in records}  # two references may mean one snapshot
    more = sum(record["bytes"] for record in named.values() if record["status"] != "present")
    download = sum(record["downloaded_bytes"] for record in named.values())
    given = {name for wanted in models for name in wanted.aliases}
    there = (replace(one, aliases=tuple(set(one.aliases) - given)) for one in survey(store.layout))
    others = [one for one in there if prune and one.key not in named and not one.kept_because]
    less = sum(one.size_bytes for one in others)
    plan = {
        "models": records,
        "removed": [one.key.as_json() for one in others],
        "aliases_moved": _moved_aliases(store, models, records),
        "download_bytes": download,
        "taken_before": space["taken"],
        "taken_after": space["taken"] + more - less,
        "quota": space["quota"],
    }

    def text(console: Console) -> None:
        rows = table("model", "commit", "dtype", "size", "download", "")
        for record in records:
            sizes = (size(record["bytes"]), size(record["downloaded_bytes"]))
            rows.add_row(record["repo_id"], record["commit"][:12], record["dtype"], *sizes, record["status"])
        console.print(rows)
        for name in plan["aliases_moved"]:
            console.print(f"would point @{name} somewhere else than now")
        for one in others:
            console.print(f"would remove {one.key}, {size(one.size_bytes)}")
        limit = f" of {size(plan['quota'])}" if plan["quota"] else ""
        console.print(
            f"{size(download)} over the network; the store takes {size(plan['taken_before'])}, "
            f"{size(plan['taken_after'])}{limit} then"
        )
        if plan["quota"] and plan["taken_after"] > plan["quota"]:
            console.print("that is more than MODELSTORE_QUOTA: raise it, or name less")

    context.print(plan, text)


def _print_done(console: Console, records: list[dict[str, Any]]) -> None:
    print_seeded(console, [record for record in records if "path" in record])
    for record in records:
        if "error" in record or "path" in record:
            continue
        what = f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {record['dtype']}"
        if "to" in record:
            console.print(f"{what} on {record['to']}, {size(record['uploaded_bytes'])} sent")
        else:
            console.print(f"{what}, {size(record['bytes'])}")
