"""The commands that look at the models on the volume, their users, and the volume itself."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.cli.app import REF, REVISION, VARIANT, Context
from modelstore.cli.output import (
    WIDE,
    console,
    fitting_table,
    key_record,
    print_snapshot,
    print_unfinished,
    print_verified,
    without_status,
)
from modelstore.errors import UsageError
from modelstore.operate import inventory
from modelstore.operate.inventory import find_key, find_plain, find_snapshot, with_twin
from modelstore.store import ModelStore
from modelstore.units import ago, counted, size, span, variant
from modelstore.volume import capabilities, engine_caches
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.unfinished import unfinished as unfinished_downloads
from modelstore.volume.verify import Position, parse_sample, save_position, save_result, saved_position, verify_folder

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

logger = logging.getLogger(__name__)


_SORTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "name": lambda record: (record["repo_id"], record["commit"], record["dtype"]),
    "size": lambda record: -record["bytes"],
    "used": lambda record: float("inf") if record["idle_s"] is None else record["idle_s"],
}


def list_models(
    context: Context,
    sort: Annotated[
        str, typer.Option("--sort", help="By name, size (the largest first) or used (the latest).")
    ] = "name",
    having: Annotated[
        str | None,
        typer.Option("--filter", metavar="TEXT", help="Only models with TEXT in their name, dtype or alias."),
    ] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Only the downloads that are not published.")
    ] = False,
) -> None:
    """List the published models: size, last use, pins, aliases, users. And the unfinished downloads."""
    if sort not in _SORTS:
        raise UsageError(f"--sort {sort} is not known: use {', '.join(_SORTS)}")
    store = context.volume()
    downloads = [inventory.unfinished_record(store.layout, each) for each in unfinished_downloads(store.layout)]
    models = [] if unfinished else sorted(inventory.models(store.layout), key=_SORTS[sort])
    if having is not None:
        models, downloads = [[each for each in records if _has(each, having)] for records in (models, downloads)]

    def text(console: Console) -> None:
        if models:
            console.print(_models_table(console, models))
            users = sum(bool(model["in_use_by"]) for model in models)
            total = size(sum(model["bytes"] for model in models))
            console.print(f"{counted(len(models), 'model')}, {total}, {users} in use")
            caches = [cache for model in models for cache in model["engine_caches"]]
            if caches:
                code = size(sum(cache["bytes"] for cache in caches))
                console.print(f"{counted(len(caches), 'cache')} of engines' compiled code, {code}")
        elif downloads:
            pass
        elif unfinished or having is not None:
            console.print("no unfinished downloads" if unfinished else f"nothing in {store.settings.root} matches")
        else:
            console.print(f"no snapshots in {store.settings.root}: publish one with `modelstore seed org/name`")
        print_unfinished(console, downloads)

    context.print(downloads if unfinished else models, text)


def _has(record: Mapping[str, Any], text: str) -> bool:
    names = [record["repo_id"], record["dtype"], *(f"@{name}" for name in record.get("aliases", ()))]
    return any(text.lower() in name.lower() for name in names)


def du(context: Context) -> None:
    """Show the space of models and leftovers, against the quota. And the space that an eviction would free."""
    store = context.volume()
    usage = inventory.space(store.layout, store.settings)

    def text(console: Console) -> None:
        rows = [
            {
                "size": size(model["bytes"]),
                "model": model["repo_id"],
                "commit": model["commit"][:12],
                "dtype": variant(model),
                "last used": ago(model["idle_s"]),
                "kept because": model["kept_because"],
            }
            for model in usage["snapshots"]
        ]
        if rows:
            console.print(fitting_table(console, rows, list(rows[0]), ("commit", "last used", "kept because", "dtype")))
        for kind, count in usage["kinds"].items():
            if count and kind != "models":
                console.print(f"{size(count)} {_KINDS.get(kind, kind)}")
        limit = f" of {size(usage['quota'])}, {size(usage['free'])} free" if usage["quota"] else ", without a quota"
        console.print(f"{size(usage['taken'])} taken{limit}")
        console.print(f"{size(usage['evictable'])} an eviction would free")

    context.print(usage, text)


_KINDS = {
    "staging": "staging: unfinished downloads, see `modelstore ls`",
    "engine-caches": "engine-caches: code that engines have compiled",
    "quarantine": "quarantine: damaged snapshots",
    "trash": "trash: removals that were cut short",
    "promised": "promised to downloads that run",
}


def claims(context: Context) -> None:
    """Show the running downloads, and whether each is alive."""
    store = context.volume()
    records = inventory.claims(store.layout)
    context.print(records, lambda console: console.print(_claims_drawn(console, records, store.settings.lease_s)))


def watch(
    context: Context,
    every_s: Annotated[float, typer.Option("--every-s", min=0.2, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Stop after so many looks.")] = None,
) -> None:
    """Follow downloads and use as they change, until Ctrl-C. With --json one line for each look."""
    from rich.console import Group
    from rich.live import Live

    store = context.volume()

    def looked() -> dict[str, Any]:
        claims, models = inventory.claims(store.layout), inventory.models(store.layout)
        return {"at": round(time.time()), "claims": claims, "models": models}

    def drawn(state: dict[str, Any]) -> Group:
        used = [model for model in state["models"] if model["in_use_by"]]
        head = f"{store.settings.root}  {time.strftime('%H:%M:%S', time.localtime(state['at']))}  "
        head += f"{len(state['models'])} models, {len(used)} in use"
        return Group(
            head,
            _claims_drawn(screen, state["claims"], store.settings.lease_s),
            *[f"{m['repo_id']}: {', '.join(m['in_use_by'])}" for m in used],
        )

    screen = console()
    remaining = count
    try:
        with Live(console=screen, auto_refresh=False, transient=False) as live:
            while remaining is None or remaining > 0:
                state = looked()
                if context.json:
                    print(json.dumps(state), flush=True)
                elif screen.is_terminal:
                    live.update(drawn(state), refresh=True)
                else:
                    screen.print(drawn(state))
                remaining = None if remaining is None else remaining - 1
                if remaining != 0:
                    time.sleep(every_s)
    except KeyboardInterrupt:
        return


def doctor(
    context: Context,
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="A model that shall be within reach.")
    ] = None,
    peer: Annotated[
        Path | None, typer.Option("--peer", help="The store's folder on another mount of the same volume.")
    ] = None,
) -> None:
    """Check whether a fleet can rely on this volume. Mount, locks, renames, rates, space, clock, token, leftovers."""
    from modelstore.operate.doctor import diagnose, exit_code

    if peer is not None and not peer.is_absolute():
        raise UsageError("--peer must be a full path")
    findings = list(diagnose(context.store().settings, peer=peer, reference=reference))
    records = [
        {name: getattr(finding, name) for name in ("check", "level", "what", "why", "do")} for finding in findings
    ]

    def text(console: Console) -> None:
        for finding in findings:
            console.print(f"{finding.level:<7} {finding.check}: {finding.what}")
            if finding.level != "ok":
                console.print(f"        {finding.why}: {finding.do}")

    context.print(records, text)
    raise typer.Exit(exit_code(findings))


def show(
    context: Context,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Show one snapshot: its files, sizes and digests, and its source."""
    store = context.store()
    snapshot = find_snapshot(store, reference, revision, dtype)
    caches = engine_caches.records(store.layout, snapshot.key)
    source = snapshot.manifest.source
    record = without_status(snapshot) | {
        "created_at": snapshot.manifest.created_at,
        "source": source.as_json(),
        "stored_unchanged": snapshot.manifest.stored_unchanged,
        "file_list": [
            {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256} for file in snapshot.manifest.files
        ],
        "engine_caches": caches,
    }
    context.print(record, lambda console: print_snapshot(console, snapshot, caches))


def path(
    context: Context,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Print the folder of a snapshot; touches no network."""
    snapshot = find_plain(context.store(), reference, revision, dtype)
    print(json.dumps({"path": str(snapshot.path)}) if context.json else snapshot.path)


def verify(
    context: Context,
    reference: Annotated[str | None, typer.Argument(metavar="[REF]", help="One model; all without it.")] = None,
    sample: Annotated[
        str | None, typer.Option("--sample", help="Compare a part, as in 1/20; the next run takes the next part.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop after that long; the next run goes on from there.")
    ] = None,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Compare snapshots with their manifests, byte by byte. All of them without REF; touches no network."""
    store = context.store() if reference else context.volume()
    stride = parse_sample(sample) if sample is not None else 1
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError("--max-seconds must be a number above 0")
    in_parts = sample is not None or max_seconds is not None
    until = time.monotonic() + (max_seconds or float("inf"))
    keys = list(with_twin(store, find_key(store, reference, revision, dtype)) if reference else store.catalog.keys())
    if in_parts:  # the snapshot that was compared longest ago comes first
        keys.sort(key=lambda key: _mtime(store.layout.verified(key)))
    records = [_verify(store, key, stride, until, in_parts=in_parts) for key in keys]
    if not reference:  # a snapshot that was evicted since the store was listed is not damaged
        records = [record for record in records if record["ok"] or Path(record["path"]).exists()]
    context.print(records, lambda console: print_verified(console, records))
    raise typer.Exit(0 if all(record["ok"] for record in records) else 5)


def _models_table(console: Console, models: Sequence[Mapping[str, Any]]) -> Table:
    wide = console.width >= WIDE
    rows = []
    for model in models:
        kept = [f"@{name}" for name in model["aliases"]] + (["pin"] if model["pinned"] else []) + model["in_use_by"]
        name = model["repo_id"] if model["complete"] and not model["problem"] else f"{model['repo_id']} (damaged)"
        rows.append(
            {
                "model": name if wide else "\n  ".join([name, *kept]),
                "commit": model["commit"][:12],
                "dtype": variant(model),
                "files": str(model["files"]),
                "size": size(model["bytes"]),
                "last used": "never" if model["idle_s"] is None else ago(model["idle_s"]),
                "kept by": ", ".join(kept),
            }
        )
    columns = ("model", "commit", "dtype", "files", "size", "last used", *(("kept by",) if wide else ()))
    return fitting_table(console, rows, columns, ("files", "commit", "last used", "dtype"))


def _claims_drawn(console: Console, records: list[dict[str, Any]], lease_s: float) -> Group | str:
    """The claims as a table, and a line for each that is silent."""
    if not records:
        return "there are no downloads"
    from rich.console import Group

    rows = [
        {
            "model": record["repo_id"],
            "commit": record["commit"][:12],
            "dtype": variant(record),
            "worker": f"{record['worker']} ({record['host']})",
            "phase": record["phase"],
            "progress": f"{record['done'] / record['total']:.0%} of {size(record['total'])}" if record["total"] else "",
            "left": f"{record['eta_s']:.0f} s" if record["alive"] and record["eta_s"] is not None else "",
            "state": "alive" if record["alive"] else "gone",
        }
        for record in records
    ]
    drawn = fitting_table(console, rows, list(rows[0]), ("commit", "phase", "dtype", "left"))
    silent = [record for record in records if not record["alive"]]
    return Group(drawn, *(f"{each['repo_id']}: {_silence(each['silent_s'], lease_s)}" for each in silent))


def _silence(silent_s: float, lease_s: float) -> str:
    """The state of a claim without heartbeats: a dead process is found at once, a dead host by the lease."""
    left_s = lease_s - silent_s
    within = f", within {left_s:.0f} s" if left_s > 0 else ""
    return f"no heartbeat for {span(silent_s)}; the next who asks takes over{within}"


def _verify(store: ModelStore, key: SnapshotKey, stride: int, until: float, *, in_parts: bool) -> dict[str, Any]:
    """One snapshot's record; a verification in parts goes on at the saved position, and saves the new one."""
    folder = store.layout.snapshot(key)
    may_change = capabilities.may_change(store.layout, store.settings)
    position = saved_position(store.layout, key, stride) if in_parts else Position()
    if in_parts:
        verified = verify_folder(
            folder,
            key,
            position,
            until=until,
            on_position=lambda position: may_change and save_position(store.layout, key, position),
        )
    else:
        verified = verify_folder(folder, key)
    whole = verified.complete and stride == 1 and position.done == 0
    is_saved = may_change and save_result(store.layout, key, verified, whole=whole, in_parts=in_parts)
    if not is_saved and not verified.intact:
        logger.warning("%s: the volume is not written, so this is not noted there", key)
    return key_record(key, folder) | {
        "ok": verified.ok,
        "complete": verified.complete,
        "compared_bytes": verified.compared,
        "planned_bytes": verified.planned,
        "findings": [asdict(finding) for finding in verified.findings],
    }


def _mtime(path: Path) -> float:
    return path.lstat().st_mtime if path.exists() else 0.0
