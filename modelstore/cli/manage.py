"""The commands that keep and take away: `rm`, `gc`, `pin` and `unpin`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.cli.app import (
    DRY_RUN,
    REF_HELP,
    REFS,
    REVISION,
    VARIANT,
    YES,
    Context,
    complete_reference,
    report_error,
)
from modelstore.cli.output import key_record, print_collected
from modelstore.dtypes import parse_dtype
from modelstore.errors import NoSpace, Refused, SnapshotNotFound, UsageError
from modelstore.operate.inventory import find_key, find_snapshot, unfinished_record, with_twin
from modelstore.reference import is_cut_commit, parse_reference, repo_id_of
from modelstore.settings import parse_size
from modelstore.store import ModelStore
from modelstore.units import size, those, variant
from modelstore.volume import aliases, pins, refs
from modelstore.volume.evict import Candidate, evict, survey
from modelstore.volume.garbage import GRACE_S, GarbagePlan, plan_collection
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.space import Space
from modelstore.volume.unfinished import drop
from modelstore.volume.unfinished import unfinished as unfinished_downloads

if TYPE_CHECKING:
    from rich.console import Console


_SOME_REFS = Annotated[
    list[str] | None, typer.Argument(metavar="[REF...]", help=REF_HELP, autocompletion=complete_reference)
]


def remove(
    context: Context,
    references: _SOME_REFS = None,
    dtype: VARIANT = None,
    revision: REVISION = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Remove unfinished downloads instead: of REF, or all of them.")
    ] = False,
    dry_run: DRY_RUN = False,
    yes: YES = False,
    force: Annotated[bool, typer.Option("--force", help="Also if it is pinned, or an alias points to it.")] = False,
) -> None:
    """Remove snapshots from the volume. A worker that is reading one is not hurt."""
    store = context.volume() if unfinished else context.store()
    if not dry_run:
        store.check_may_change()
    if unfinished:
        _remove_unfinished(context, store, references or (), dtype, revision, dry_run=dry_run, yes=yes)
        return
    if not references:
        raise UsageError("REF is missing: name a model, as in `modelstore rm org/name`, or use --unfinished")
    keys = dict.fromkeys(
        key
        for reference in references
        for key in with_twin(store, find_key(store, reference, revision, dtype, exact=True))
    )
    candidates = survey(store.layout, list(keys))
    for candidate in candidates:
        if candidate.pinned and not force:
            raise Refused(
                f"{candidate.key} is pinned: run `modelstore unpin {candidate.key.repo_id}` first, or add --force"
            )
        if candidate.aliases and not force:
            raise Refused(f"@{candidate.aliases[0]} points to {candidate.key}: repoint it first, or add --force")
    if not dry_run:
        lines = [_removal(store.layout, candidate) for candidate in candidates]
        label = f"{those(len(lines), 'model')} ({size(sum(each.size_bytes for each in candidates))})"
        context.confirm(
            f"remove {label if len(lines) > 1 else lines[0]}",
            yes=yes,
            plan=lambda console: console.print("\n".join(lines)) if len(lines) > 1 else None,
        )
    records = []
    for candidate in candidates:
        if not dry_run and not evict(store.layout, candidate.key, force=True):
            raise Refused(f"{candidate.key} is being removed by another process: look at `modelstore ls`")
        folder = store.layout.snapshot(candidate.key)
        records.append(key_record(candidate.key, folder) | {"bytes": candidate.size_bytes, "removed": not dry_run})
    _print_removed(context, records, lambda record: record["path"], single=len(records) == len(references) == 1)


def _removal(layout: Layout, candidate: Candidate) -> str:
    pinned = ", which is pinned" if candidate.pinned else ""
    pointed = f", to which {' and '.join(f'@{name}' for name in candidate.aliases)} points" if candidate.aliases else ""
    users = f", in use by {', '.join(candidate.users)}" if candidate.users else ""
    place = layout.snapshot(candidate.key)
    return f"{candidate.key}, {size(candidate.size_bytes)}, {place}{pinned}{pointed}{users}"


def _remove_unfinished(
    context: Context,
    store: ModelStore,
    references: Sequence[str],
    dtype: str | None,
    revision: str | None,
    *,
    dry_run: bool,
    yes: bool,
) -> None:
    """Drop the unfinished downloads of these models, or all that no worker goes on with."""
    if revision is not None and not references:
        raise UsageError("--revision is of a model: name it, or leave the option out")
    layout, settings = store.layout, store.settings
    variant = parse_dtype("--dtype", dtype) if dtype else None
    present = [each for each in unfinished_downloads(layout) if variant in (None, each.key.dtype)]
    chosen = {each.key: each for each in present if not references}
    for reference in references:
        matching = [each for each in present if _is_of(store, each.key, reference, revision)]
        if not matching:
            raise SnapshotNotFound(f"there is no unfinished download of {reference}: look at `modelstore ls`")
        chosen |= {each.key: each for each in matching}
    if chosen and not dry_run:
        label = those(len(chosen), "unfinished download")
        running = {True: ", which is being downloaded", False: ""}
        lines = [f"{each.key}, {size(each.size_bytes)}{running[each.is_running]}" for each in chosen.values()]
        context.confirm(
            f"remove {label} ({size(sum(each.size_bytes for each in chosen.values()))})",
            yes=yes,
            plan=lambda console: console.print("\n".join(lines)),
        )
    records = []
    kept: Refused | None = None
    for each in chosen.values():
        removed = not dry_run
        try:
            if not dry_run:
                drop(layout, each.key, worker=settings.worker_id, lease_s=settings.lease_s)
        except Refused as error:  # the others go
            report_error(error, context)
            kept, removed = error, False
        record = key_record(each.key, layout.staging(each.key))
        records.append(record | {"bytes": each.size_bytes, "removed": removed})
    if kept is None or context.json:
        shown = [record for record in records if dry_run or record["removed"]]
        _print_removed(context, shown, _unfinished_label, single=False)
    raise typer.Exit(kept.exit_code if kept is not None and references else 0)


def _is_of(store: ModelStore, key: SnapshotKey, text: str, revision: str | None) -> bool:
    """Whether a download is of the model that `text` names: of every commit, if it names no revision."""
    reference = parse_reference(text, revision=revision)
    if reference.kind == "alias":
        return key.plain == aliases.target(store.layout, reference.name)
    recorded = refs.recorded(store.layout, reference)
    if key.repo_id not in (recorded.repo_id, repo_id_of(reference)):
        return False
    if revision is None and "@" not in text:
        return True
    is_begin = is_cut_commit(reference.revision) and key.commit.startswith(reference.revision)
    return is_begin or key.commit == recorded.commit


def _print_removed(
    context: Context, records: list[dict[str, Any]], label: Callable[[dict[str, Any]], str], *, single: bool
) -> None:
    """Print what went, or would go; `label` names the thing of a record."""
    verb = {True: "removed", False: "would remove"}
    lines = [f"{verb[record['removed']]} {label(record)}, {size(record['bytes'])}" for record in records]
    context.print(
        records[0] if single else records, lambda console: console.print("\n".join(lines or ["nothing to remove"]))
    )


def _unfinished_label(record: dict[str, Any]) -> str:
    return f"the unfinished download of {record['repo_id']} {record['commit'][:12]} {variant(record)}"


def collect_garbage(
    context: Context,
    to: Annotated[
        str | None, typer.Option("--to", help="Also evict the least recently used until the store takes this, as 50GB.")
    ] = None,
    grace_s: Annotated[float, typer.Option("--grace-s", help="Leave younger files alone.")] = GRACE_S,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Remove abandoned downloads, trash and quarantine. With --to also the models that were not used for longest."""
    store = context.volume()
    layout, settings = store.layout, store.settings
    limit = parse_size("--to", to) if to is not None else None
    if to is not None and to.strip().isdigit() and 0 < int(to) < 10**6:  # 150 hardly means bytes
        raise UsageError(f"--to {to} has no unit: write it like {to}GB, or {to}B")
    if not grace_s >= settings.lease_s:
        raise UsageError(f"--grace-s must be at least the lease, {settings.lease_s:g} s")
    refs.check_format(store.layout)
    plan = plan_collection(layout, settings, grace_s=grace_s, limit_bytes=limit)
    if not dry_run and (plan.garbage or plan.evicted):
        store.check_may_change()
        planned = _collection(layout, plan, removed=False)
        parts = [(len(plan.evicted), "model"), (len(plan.garbage), "leftover")]
        label = " and ".join(those(count, noun) for count, noun in parts if count)

        def draw(console: Console) -> None:
            print_collected(console, planned)
            if limit is not None and (after := Space(layout, settings).taken() - plan.size_bytes) > limit:
                console.print(f"the store takes {size(after)} then, more than {to}")

        context.confirm(f"remove {label} ({size(plan.size_bytes)})", yes=yes, plan=draw)
        plan = plan.run(layout, settings, grace_s=grace_s)
    kept = [unfinished_record(layout, each) for each in unfinished_downloads(layout)]
    record = _collection(layout, plan, removed=not dry_run) | {"unfinished": kept}
    context.print(record, lambda console: print_collected(console, record))
    if limit is None:
        return
    taken = Space(layout, settings).taken() - (plan.size_bytes if dry_run else 0)
    if taken > limit:
        unfinished_bytes = sum(each["bytes"] for each in kept)
        unfinished = (
            f", or unfinished downloads ({size(unfinished_bytes)}: `modelstore rm --unfinished`)"
            if unfinished_bytes
            else ""
        )
        raise NoSpace(
            f"{layout.root} takes {size(taken)} then, more than {to}: the rest is in use, pinned or an alias's"
            f"{unfinished}"
        )


def _collection(layout: Layout, plan: GarbagePlan, *, removed: bool) -> dict[str, Any]:
    """The record of a collection; `removed`: it was run."""
    return {
        "bytes": plan.size_bytes,
        "removed": removed,
        "collected": [
            {
                "kind": item.kind,
                "path": str(item.path.relative_to(layout.root)),
                "bytes": item.size_bytes,
                "age_s": round(item.age_s),
            }
            for item in plan.garbage
        ],
        "evicted": [
            key_record(item.key, layout.snapshot(item.key)) | {"bytes": item.size_bytes, "idle_s": round(item.idle_s)}
            for item in plan.evicted
        ],
    }


def pin(
    context: Context,
    references: REFS,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Keep snapshots from eviction, even if the quota is exceeded."""
    store = context.store()
    store.check_may_change()
    keys = list(dict.fromkeys(find_snapshot(store, each, revision, dtype).key for each in references))
    for key in keys:
        pins.pin(store.layout, key, store.settings.worker_id)
    records = [key_record(key, store.layout.snapshot(key)) | {"pinned": True} for key in keys]
    text = "\n".join(f"pinned {key}" for key in keys)
    context.print(records[0] if len(records) == 1 else records, lambda console: console.print(text))


def unpin(
    context: Context,
    references: REFS,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Let snapshots be evicted again."""
    store = context.store()
    store.check_may_change()
    keys = list(dict.fromkeys(find_key(store, each, revision, dtype) for each in references))
    records, lines = [], []
    for key in keys:
        was_pinned = pins.unpin(store.layout, key)
        records.append(key_record(key, store.layout.snapshot(key)) | {"pinned": False})
        others = sorted(f"{other}" for other in pins.pinned(store.layout) if other.repo_id == key.repo_id)
        line = f"unpinned {key}" if was_pinned else f"{key} was not pinned"
        lines.append(line + (f"; {' and '.join(others)} still is" if others else ""))
    context.print(records[0] if len(records) == 1 else records, lambda console: console.print("\n".join(lines)))
